"""Tests of qkernels. A package, so that helpers are imported as `from tests.oracles import ...`."""
