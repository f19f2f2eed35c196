"""Tests of qkernels.autotune without a GPU: machine, compiler and timer are played."""
