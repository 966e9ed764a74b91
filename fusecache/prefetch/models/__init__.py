"""Which files make up a model, and where their tensors lie."""
