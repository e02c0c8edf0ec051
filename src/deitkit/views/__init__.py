"""What networks see: views of images, each a pure function of (view_seed, view, index), of its mixing partner and of the size asked for.

It may import from `data`, `config`, `randaugment`, `rng`, `terminal` and `waiting`, never from a network, a loss or a training.
A view is cropped image by image (stage one), then augmented and mixed in batches (stage two).

    image_ops   operations on batches of uint8 images, equal to Pillow's
    augment     crops, RandAugment, 3-Augment, jitter, erasing: what happens to one image
    mixup       mixup and CutMix of mutual partners; `RawBatch` and `Batch`
    loader      batches for training and evaluation; figures and sheets for `deit data show`
    prefetch    batches made ahead by worker processes

The letters at the end of a tensor's name are its dimensions, here and in every package:

    B  images of a batch                M  images that a batch needs: its own, then partners from outside it
    C  channels                         H, W  height and width in pixels
    K  classes                          T  tokens: class, distillation, patches
    D  width of a token                 L  layers
    A  all images of a split            N  those of them that can be read; also the patches of an image
"""
