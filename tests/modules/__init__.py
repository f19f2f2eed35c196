"""Tests of qkernels.modules, with torch.ao's classes of the same names as the live oracle."""
