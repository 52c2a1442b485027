"""Experiments from a file: configuration, data, built-in models, the runner, the demo.

Needs `meristem-torch[cli]`.
"""
