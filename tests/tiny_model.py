"""A random Llama of two layers with a byte tokenizer: no download, fractions of a second."""

import torch

TEXT = (
    "The cache keeps a few tokens of every head and folds the others into a small state, so that "
    "later queries still see them, if only through a glass and darkly. "
)


def tiny_model(seed=0, head_dim=16):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=257,
    )
    return LlamaForCausalLM(config).eval()


BOS = 258


def byte_tokenizer(bos=False):
    """A token per byte; with `bos`, texts are opened by ``BOS``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)} | {"<end>": 256, "<pad>": 257}
    names = {"eos_token": "<end>", "pad_token": "<pad>"}
    if bos:
        vocabulary["<bos>"] = BOS
        names["bos_token"] = "<bos>"
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", BOS)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def save_tiny(folder, bos=False):
    """The model and its tokenizer as a folder that ``--model`` takes."""
    tiny_model().save_pretrained(folder)
    byte_tokenizer(bos).save_pretrained(folder)
    return folder


def tiny_sidekick(rank=4, hidden=8, decay=0.98):
    from less import Sidekick

    sidekick = Sidekick.random(2, 4, 2, 16, rank, hidden, "exp", torch.Generator().manual_seed(0))
    policy = {"name": "H2O", "heavy": 8, "recent": 8, "decay": decay}
    sidekick.config["policies"] = [policy]
    return sidekick


def tiny_calibration(seed=0):
    """Means and scales that differ by channel, noted as the tiny model's."""
    from less import Calibration
    from less.calibration import NAMES
    from less.sidekick.identity import model_identity

    g = torch.Generator().manual_seed(seed)

    def normal(factor):
        return torch.randn(2, 16, generator=g) * factor

    def layer():
        scales = normal(0.3).exp(), normal(0.3).exp()
        return dict(zip(NAMES, (normal(0.5), scales[0], normal(0.5), scales[1]), strict=True))

    return Calibration([layer(), layer()], {"model": model_identity(tiny_model())})
