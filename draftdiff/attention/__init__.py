"""The method on plain tensors: draft, selection and kernel, for every medium."""
