"""Parity of ``models/`` with the networks of torchvision, timm and Hugging Face.

Weights and inputs are drawn from the tensors' names, so both sides have the same and only outputs need to be stored.
``tests/parity/test_parity.py`` compares with stored ones (``goldens/``); ``python -m tests.parity`` with the originals
themselves, where torch is installed.
"""
