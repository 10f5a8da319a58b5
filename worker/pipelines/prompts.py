"""Prompts: what a pipeline would cut off, or take for plain text, is encoded here, by compel.

A prompt that fits and weighs no words is left to the pipeline itself. compel calls the text encoders of the run's own
pipeline, which the engine intercepts: its calls are batched and kept like any other.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from compel import Compel, ReturnedEmbeddingsType
from compel.prompt_parser import FlattenedPrompt
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from app.core.errors import PromptTooLong
from app.core.params import GenerationParams
from app.core.prompt_weights import Part, parse
from worker.pipelines.arguments import parameters

LAST = ReturnedEmbeddingsType.LAST_HIDDEN_STATES_NORMALIZED
PENULTIMATE = ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED


def with_prompts(
    asked: dict[str, Any], pipe: Any, params: GenerationParams, *, in_pieces: bool = True
) -> dict[str, Any]:
    """The arguments of the pipeline's call, with embeddings in the place of prompts that it cannot take as they are.

    A prompt that no text encoder of the pipeline reads to its end is read `in_pieces`. Raises PromptTooLong where it
    cannot be, or shall not.
    """
    if "prompt" not in asked:
        return asked
    prompts = params.prompt, params.negative_prompt
    parts = [parse(prompt) if params.prompt_weighting else [Part(prompt, 1.0)] for prompt in prompts]
    are_short = all(fits(pipe, " ".join(part.text for part in of)) for of in parts)
    if are_short and not params.prompt_weighting:
        return asked
    if not (can_weigh(pipe) and (are_short or in_pieces)):
        raise PromptTooLong(f"the prompt is too long: model {params.model!r} reads {_room(pipe)} tokens and no more")
    with torch.no_grad():
        given = _embeddings(pipe, parts)
    return {name: value for name, value in asked.items() if name not in ("prompt", "negative_prompt")} | given


def can_weigh(pipe: Any) -> bool:
    """Whether words can be weighed, and long prompts be read in pieces: where all text encoders are CLIP's."""
    accepts_embeddings = {"prompt_embeds", "negative_prompt_embeds"} <= parameters(pipe).keys()
    encoders = [getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2", "text_encoder_3")]
    match encoders:
        case [CLIPTextModel(), None, None]:
            return accepts_embeddings
        case [CLIPTextModel(), CLIPTextModelWithProjection(), None]:
            return accepts_embeddings and "pooled_prompt_embeds" in parameters(pipe)
    return False


def fits(pipe: Any, prompt: str) -> bool:
    """Whether one of the pipeline's text encoders reads the prompt to its end."""
    known = list(_tokenizers(pipe))
    if not known:
        return True
    return any(len(tokenizer(prompt, verbose=False)["input_ids"]) <= most for tokenizer, most in known)


def _room(pipe: Any) -> int:
    return max(most for _, most in _tokenizers(pipe))


def _tokenizers(pipe: Any) -> Iterator[tuple[Any, int]]:
    """Each tokenizer, and how many tokens of it are read, its own marks among them."""
    asked = parameters(pipe).get("max_sequence_length")
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        tokenizer = getattr(pipe, name, None)
        if tokenizer is None or getattr(pipe, f"text_encoder{name.removeprefix('tokenizer')}", None) is None:
            continue
        if asked is None or isinstance(tokenizer, CLIPTokenizer):
            yield tokenizer, tokenizer.model_max_length
        else:
            yield tokenizer, asked.default


def _embeddings(pipe: Any, parts: Sequence[Sequence[Part]]) -> dict[str, Any]:
    """Of the prompt and the negative prompt, as long as each other: the pipelines ask for that."""
    if getattr(pipe, "text_encoder_2", None) is None:
        both = _read(pipe.tokenizer, pipe.text_encoder, LAST, parts)
        return dict(zip(("prompt_embeds", "negative_prompt_embeds"), both, strict=True))
    left = _read(pipe.tokenizer, pipe.text_encoder, PENULTIMATE, parts)
    right = _read(pipe.tokenizer_2, pipe.text_encoder_2, PENULTIMATE, parts)
    both = [torch.cat(pair, dim=-1) for pair in zip(left, right, strict=True)]
    pooled = [_pooled(pipe, " ".join(part.text for part in of)) for of in parts]
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return dict(zip(names, [*both, *pooled], strict=True))


def _read(tokenizer: Any, encoder: Any, kind: Any, parts: Sequence[Sequence[Part]]) -> list[torch.Tensor]:
    """(1, tokens, width) for each prompt; a long one is read in pieces of the encoder's length, one after the other.

    The Compel is this run's own: it keeps what it encoded, which may have been computed in another run's company.
    """
    compel = Compel(tokenizer, encoder, truncate_long_prompts=False, returned_embeddings_type=kind)
    prompts = [FlattenedPrompt([tuple(part) for part in of] or [("", 1.0)]) for of in parts]
    read = [compel.build_conditioning_tensor_for_prompt_object(prompt)[0][0] for prompt in prompts]
    padded: list[torch.Tensor] = compel.pad_conditioning_tensors_to_same_length(read)
    return padded


def _pooled(pipe: Any, prompt: str) -> torch.Tensor:
    """What the second text encoder makes of the prompt's beginning as a whole, which has no pieces and no weights."""
    inputs = pipe.tokenizer_2(
        prompt,
        padding="max_length",
        max_length=pipe.tokenizer_2.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    embeds: torch.Tensor = pipe.text_encoder_2(inputs.input_ids.to(pipe.text_encoder_2.device)).text_embeds
    return embeds
