"""One command that checks a GPU: ``tools/gpu_check.py``; docs/gpu.md is the user's view."""
