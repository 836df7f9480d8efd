"""Passes written by hand over decoders of Llama's shape: loss and LoRA gradients, and scores, without autograd.

    streams    rows as one stream of fixed sizes, one tensor that goes to the device at once
    bushes     prompts that begin alike, and answers that do, as such streams
    weights    linear layers stacked; LoRA's second factors stand beside the frozen weights, so that one product has both
    layers     one decoder layer forward and backward
    passes     the whole model: loss and gradients, scores
    arithmetic what is not a product of matrices: kernels on a GPU, torch elsewhere
    kernels, attention_kernels    those kernels, in Triton
    engine     runs the passes without waiting for the device
    support    which models, weights and adapters all this knows

docs/experiments.md has what each of these brought.
"""
