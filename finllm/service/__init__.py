"""A trained model as an HTTP service: batches what many clients ask at once. Needs the extra `finllm[serve]`."""
