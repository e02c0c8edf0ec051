"""Networks: the student (a vision transformer), convolutional teachers, their weights on disk, and predictions.

Everything here maps images in [0, 1] to logits; nothing here trains. May import `views`, `data` and what is below them.

network   a body behind its preprocessing, `Heads`, ensembles, devices and precision
vit       the student: DeiT, ViT, DeiT III
cnn       networks by name: CIFAR ResNets, Lite0, timm, torchvision
zoo       named students, `model.json`, saving and loading, costs
weights   files and hubs of weights; the tensor names of timm, Hugging Face and the original
start     weights that a student starts from (`--init`)
predict   probabilities for files, Pillow images and arrays
"""
