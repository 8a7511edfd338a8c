"""The words of the embedded generator: a byte-pair tokenizer and a small CLIP text encoder.

The encoder learns to answer what a caption says (shape, colour, size and fill of each object, background,
relation) from the state at the end-of-text token. The denoiser then reads its states, frozen.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from data_gen.embedded.training import Draws, StageConfig, train_stage
from data_gen.scenes import (
    CATEGORIES,
    HELD_OUT_COMBINATIONS,
    RELATIONS,
    Description,
    Mention,
    describe,
    sample_captions,
    sample_scene,
    scene_rng,
)

CONTEXT_LENGTH = 48
NUM_TOKENIZER_CAPTIONS = 5000
WIDTH = 128
_START, _END = "<|startoftext|>", "<|endoftext|>"
_MAX_OBJECTS = 3
_OBJECT_QUESTIONS = ("shape", "colour", "size", "fill")


def build_tokenizer(
    seed: int, num_captions: int = NUM_TOKENIZER_CAPTIONS, vocabulary_size: int = 1024
) -> CLIPTokenizer:
    """Learn byte-pair merges from captions of the grammar.

    Every byte has a token of its own, so any Unicode text can be written; unknown words are spelt.
    """
    end_of_word = "</w>"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet = letters + [letter + end_of_word for letter in letters]
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=end_of_word))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        initial_alphabet=letters,
        end_of_word_suffix=end_of_word,
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample_captions(num_captions, seed), trainer)
    learnt = tokenizer.get_vocab()
    words = alphabet + sorted(set(learnt) - set(alphabet), key=learnt.__getitem__) + [_START, _END]
    return CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)},
        merges=_merges(tokenizer),
        model_max_length=CONTEXT_LENGTH,
    )


def _merges(tokenizer: Tokenizer) -> Any:
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Build the untrained encoder: three causal layers of width 128, 0.7 million parameters."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT_LENGTH,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tokenize(tokenizer: CLIPTokenizer, captions: list[str], device: torch.device) -> Tensor:
    """Token ids [B, 48], padded as the pipeline pads."""
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return ids.to(device)


class CaptionReader(nn.Module):
    """The encoder with one linear answer sheet: every question about a caption, "not said" being an answer.

    Shapes:
        forward: [B, 48] -> [B, sum of the numbers of answers].
    """

    def __init__(self, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        per_object = [len(CATEGORIES[name]) + 1 for name in _OBJECT_QUESTIONS]
        self.num_answers = per_object * _MAX_OBJECTS + [len(CATEGORIES["background"]) + 1, len(RELATIONS) + 1]
        self.answers = nn.Linear(WIDTH, sum(self.num_answers))

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of all answers."""
        return self.answers(self.text_encoder(ids).pooler_output)

    def split(self, logits: Tensor) -> tuple[Tensor, ...]:
        """One tensor [B, answers] a question."""
        return logits.split(self.num_answers, dim=1)


def answers_of(description: Description) -> list[int]:
    """The index of the right answer to each question; 0 is "not said"."""
    absent = Mention(None, None, None, None)
    mentions = (*description.mentions, *(absent,) * (_MAX_OBJECTS - len(description.mentions)))
    answers = [
        _index(CATEGORIES[name], getattr(mention, name)) for mention in mentions for name in _OBJECT_QUESTIONS
    ]
    return [
        *answers,
        _index(CATEGORIES["background"], description.background),
        _index(tuple(RELATIONS), description.relation),
    ]


def _index(values: tuple[str, ...], value: str | None) -> int:
    return 0 if value is None else 1 + values.index(value)


def train_text_encoder(
    tokenizer: CLIPTokenizer, config: StageConfig, folder: Path, seed: int, device: torch.device
) -> CaptionReader:
    """Train the encoder to answer the questions about captions without held-out combinations."""
    torch.manual_seed(seed)
    reader = CaptionReader(build_text_encoder(tokenizer)).to(device)

    def loss_of(draws: Draws) -> Tensor:
        descriptions = draw_training_captions(draws, config)
        ids = tokenize(tokenizer, [description.text for description in descriptions], device)
        longest = int((ids != tokenizer.pad_token_id).sum(dim=1).max()) + 1
        answers = torch.tensor([answers_of(description) for description in descriptions], device=device)
        with torch.autocast(device.type, torch.bfloat16):
            logits = reader.split(reader(ids[:, :longest]))
        losses = [F.cross_entropy(some.float(), answers[:, i]) for i, some in enumerate(logits)]
        return torch.stack(losses).sum()

    train_stage("text_encoder", reader, loss_of, config, folder, seed)
    return reader


def draw_training_captions(draws: Draws, config: StageConfig) -> list[Description]:
    """The captions of one step: none names a held-out combination."""
    return [
        describe(sample_scene(draws.numpy, exclude=HELD_OUT_COMBINATIONS), draws.numpy)
        for _ in range(config.num_examples_per_step)
    ]


@torch.inference_mode()
def measure_reading(reader: CaptionReader, tokenizer: CLIPTokenizer, num_captions: int, seed: int) -> float:
    """Return the share of captions of which every answer is right, held-out combinations included."""
    device = next(reader.parameters()).device
    rngs = [scene_rng(seed, "embedded-reading", index) for index in range(num_captions)]
    descriptions = [describe(sample_scene(rng), rng) for rng in rngs]
    logits = reader.split(reader(tokenize(tokenizer, [d.text for d in descriptions], device)))
    given = torch.stack([some.argmax(dim=1) for some in logits], dim=1)
    right = torch.tensor([answers_of(d) for d in descriptions], device=device)
    return (given == right).all(dim=1).float().mean().item()
