"""Leaving the house: a network for other programs, checked against the one it came from. Imports training and everything below it.

export.py    every format by its name
formats.py   a student's weights for timm, Hugging Face and the original DeiT, bit for bit
onnx.py      students and teachers as one ONNX file that takes images as they are
executorch.py  the same as a program for telephones
parity.py    does the exported file predict what the network predicts?
web.py       a folder that classifies in a browser
serve/       classifying over HTTP
"""
