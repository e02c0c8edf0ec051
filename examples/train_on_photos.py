"""Train on a folder of images, look at the figures, classify an image, ask why.

Run the file, or cell by cell in an editor that knows `# %%`. DATA is small and always there; put the path of your own folder instead
(one subfolder per class), and leave out `student` and `epochs`.
"""

# %% Train: the figures are those of the validation images
import deitkit as dk

DATA = "digits"
run = dk.train(DATA, student="deit_pico", teacher="none", epochs=2, out="runs/photos")
print(run)

# %% What the largest class alone would give stands beside the accuracy
print(f"{run.summary['top1']['cls']:.1%}, largest class {run.summary['largest_class']:.1%}")

# %% Classify an image: a path, a Pillow image or an array; here one of the digits
from sklearn.datasets import load_digits

image = (load_digits().images[0] * 15.9).astype("uint8")
(prediction,) = run.predict(image, top=3)
print(prediction.as_text())

# %% An answer only where it is sure
(prediction,) = run.predict(image, min_confidence=0.99)
print("none of these" if prediction.answer is None else prediction.answer)

# %% The page with pictures, and the test images: once, at the end
print(run.report())
print(f"test accuracy {run.evaluate(split='test')['top1']['cls']:.1%}")
