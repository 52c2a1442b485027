"""The only part that changes a model: new tensors, optimizer state, verification, and
an exchange that can be undone.
"""
