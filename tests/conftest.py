"""Fixtures that more than one test file needs."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The public data sets, in $FINLLM_DATA or beside the checkout; a clone has none and skips, CI must have them."""
    folder = Path(os.environ.get("FINLLM_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "phrasebank").is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI needs the data sets, and {folder} does not hold them")
        pytest.skip(f"needs the public data sets; {folder} does not hold them")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer Llama of random weights, and a tokenizer without a pad token, as Llama-3 has none."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from finllm.data.sample import Sample
    from finllm.recipe import Prompt

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    words = [Prompt().instruction, "Text: Sentiment: negative neutral positive"] * 50
    tokenizer.train_from_iterator([*words, *(e.text for e in Sample(name="sample").read()[:200])], trainer)
    folder = tmp_path_factory.mktemp("tiny")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
