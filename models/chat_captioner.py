"""Captions by a chat model that sees pictures, and the checks that each caption belongs to its own picture.

Three things keep an answer with its picture. Each picture has an id of random letters, which the answer has to name,
so that answers that were exchanged on their way are found. Among the pictures are plain ones whose colour the answer
has to name, so that a model that mixes up its pictures is found. And the key of a kept answer holds all that was asked.
Where CLIP is at hand, it says in the end whether captions fit their own pictures better than those of others.
"""

import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from models.chat import ChatAnswer, ChatModel, ChatRequest

SENTINEL_COLORS = {
    "red": (200, 20, 20),
    "green": (20, 160, 40),
    "blue": (20, 40, 200),
    "yellow": (240, 220, 20),
    "white": (250, 250, 250),
    "black": (5, 5, 5),
}
"""Colour word to RGB of the plain pictures."""
SENTINEL_PX = 224
JPEG_QUALITY = 90
MIN_PICTURES = 8
MIN_SPREAD = 0.02
"""Of cosines between a picture and all captions: what fits and what does not are about 0.1 apart in CLIP."""
CHANCE_DEVIATIONS = 2.0
"""By how many standard deviations the mean rank has to exceed what chance gives."""
GREY = 127
_CONTROL_TO_SPACE = dict.fromkeys(range(32), " ")
"""Between JSON's values they are white space; within its texts they are forbidden, and vLLM lets models write them."""


class AlignmentError(Exception):
    """Answers do not belong to the pictures that were asked about."""


@dataclass(frozen=True)
class Subject:
    """A picture to be captioned.

    Attributes:
        key: What it is called outside.
        jpeg: The picture.
    """

    key: str
    jpeg: bytes

    @property
    def picture_id(self) -> str:
        """The id under which the model answers: eight letters that nothing else tells."""
        digest = hashlib.sha256(self.key.encode() + self.jpeg).digest()
        return "".join(chr(ord("a") + byte % 26) for byte in digest[:8])


@dataclass(frozen=True)
class Prompts:
    """The words around the pictures.

    Attributes:
        system: Holds for all.
        question: With `{count}`, `{ids}` and `{sentences}`.
        repair: With `{question}`, `{answer}` and `{problem}`.
    """

    system: str
    question: str
    repair: str


@dataclass(frozen=True)
class Caption:
    """What the model says of one picture, or why it says nothing."""

    sentences: tuple[str, ...] = ()
    error: str = ""
    retryable: bool = False


def caption_pictures(
    model: ChatModel,
    subjects: Sequence[Subject],
    prompts: Prompts,
    max_sentences: int,
    pictures_per_request: int = 1,
    sentinels: int = 0,
    max_tokens: int = 1024,
    check: Callable[[dict[str, Caption]], None] = lambda captions: None,
) -> dict[str, Caption]:
    """Caption pictures.

    An answer that cannot be used is asked for once more, with what is wrong with it.

    Args:
        model: Answers.
        subjects: The pictures; their keys differ.
        prompts: What is asked.
        max_sentences: Of one picture; what is beyond is cut off.
        pictures_per_request: Pictures in one question.
        sentinels: Plain pictures that are asked about among the others; where a question holds several pictures, each
            has one, if any are wanted.
        max_tokens: Longest answer, a picture.
        check: Raises an `AlignmentError` where captions do not fit their pictures. Then no answer is kept.

    Returns:
        Key to caption, for each subject.

    Raises:
        AlignmentError: A plain picture was described as something else.
        ChatError: No request can be answered.
    """
    if not subjects:
        return {}
    groups = [list(subjects[at : at + pictures_per_request]) for at in range(0, len(subjects), pictures_per_request)]
    plain = _add_sentinels(groups, sentinels, pictures_per_request)
    requests = [_ask_about(group, index, prompts, max_sentences, max_tokens) for index, group in enumerate(groups)]
    asked = list(requests)
    found: dict[str, Caption] = {}
    again: list[tuple[list[Subject], ChatRequest, ChatRequest]] = []
    for group, request, answer in zip(groups, requests, model.ask(requests), strict=True):
        try:
            found |= _read(group, answer, max_sentences)
        except ValueError as problem:
            text = prompts.repair.format(question=request.text, answer=answer.text, problem=problem)
            again.append((group, request, replace(request, text=text)))
    asked += [repaired for _, _, repaired in again]
    answers = model.ask([repaired for _, _, repaired in again])
    for (group, request, repaired), answer in zip(again, answers, strict=True):
        try:
            found |= _read(group, answer, max_sentences)
        except ValueError as problem:
            model.forget([request, repaired])
            failed = Caption(error=f"request {request.key}: the model answered twice what cannot be used: {problem}")
            found |= {subject.key: failed for subject in group}
    try:
        for subject, color in plain:
            _check_sentinel(found.pop(subject.key), color)
        check(found)
    except AlignmentError:
        model.forget(asked)
        raise
    return found


def _ask_about(
    group: Sequence[Subject], index: int, prompts: Prompts, max_sentences: int, max_tokens: int
) -> ChatRequest:
    ids = [subject.picture_id for subject in group]
    text = prompts.question.format(count=len(ids), ids=", ".join(ids), sentences=max_sentences)
    sentences = {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": max_sentences}
    schema = {
        "type": "object",
        "properties": dict.fromkeys(ids, sentences),
        "required": ids,
        "additionalProperties": False,
    }
    pictures = tuple(subject.jpeg for subject in group)
    return ChatRequest(str(index), text, prompts.system, pictures, schema, max_tokens * len(group))


def _read(group: Sequence[Subject], answer: ChatAnswer, max_sentences: int) -> dict[str, Caption]:
    """The captions in an answer.

    Raises:
        ValueError: It cannot be used; says why.
    """
    if answer.text is None:
        return {subject.key: Caption(error=answer.error, retryable=answer.retryable) for subject in group}
    values = parse_json_object(answer.text)
    asked, answered = [subject.picture_id for subject in group], list(values)
    if sorted(asked) != sorted(answered):
        raise ValueError(f"it tells of the pictures {', '.join(answered) or 'none'}, asked were {', '.join(asked)}")
    return {s.key: Caption(_read_sentences(s.picture_id, values[s.picture_id], max_sentences)) for s in group}


def _read_sentences(picture_id: str, value: Any, max_sentences: int) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(sentence, str) for sentence in value):
        raise ValueError(f"under {picture_id} is no list of sentences: {json.dumps(value)[:100]}")
    sentences = [" ".join(sentence.split()) for sentence in value]
    for sentence in sentences:
        sentence.encode()  # half of a letter is a ValueError here
    sentences = list(dict.fromkeys(sentence for sentence in sentences if sentence))
    if not sentences:
        raise ValueError(f"it says nothing of {picture_id}")
    return tuple(sentences[:max_sentences])


def parse_json_object(text: str) -> dict[str, Any]:
    """The one JSON object in an answer, which some models wrap in a fenced block.

    Raises:
        ValueError: There is none; says why.
    """
    text = text.translate(_CONTROL_TO_SPACE)
    start, end = text.find("{"), text.rfind("}")
    try:
        value = json.loads(text[start : end + 1] if 0 <= start < end else text)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"it is a JSON {type(value).__name__}, expected an object")
    return value


def _make_sentinel(subjects: Sequence[Subject], index: int) -> tuple[Subject, str]:
    """A plain picture, whose colour depends on the pictures around it."""
    told = "".join(subject.picture_id for subject in subjects) + str(index)
    digest = hashlib.sha256(told.encode()).digest()
    color = list(SENTINEL_COLORS)[digest[0] % len(SENTINEL_COLORS)]
    image = np.full((SENTINEL_PX, SENTINEL_PX, 3), SENTINEL_COLORS[color], np.uint8)
    return Subject(f"sentinel-{index}-{digest.hex()[:8]}", encode_jpeg(image)), color


def _add_sentinels(groups: list[list[Subject]], sentinels: int, pictures_per_request: int) -> list[tuple[Subject, str]]:
    """Put plain pictures among the others: into each group of several pictures, or as groups of their own."""
    if pictures_per_request == 1:
        subjects = [subject for group in groups for subject in group]
        plain = [_make_sentinel(subjects, index) for index in range(sentinels)]
        groups += [[subject] for subject, _ in plain]
        return plain
    plain = [_make_sentinel(group, index) for index, group in enumerate(groups)] if sentinels else []
    for group, (subject, _) in zip(groups, plain, strict=False):
        group.insert(len(group) // 2, subject)
    return plain


def _check_sentinel(caption: Caption, color: str) -> None:
    if caption.error:
        return  # it was not answered, and says nothing about the others
    said = " ".join(caption.sentences)
    if not re.search(rf"\b{color}\b", said.lower()):
        raise AlignmentError(
            f"a picture that is all {color} was described as {said[:200]!r}: answers may stand beside the wrong "
            "pictures, none is kept; check the endpoint and the model, or set sentinels=0 for a model that is too weak"
        )


def check_fit(
    pictures: Float32[np.ndarray, "picture dim"], captions: Float32[np.ndarray, "picture dim"]
) -> float | None:
    """How far up a picture's own caption ranks among the captions of all, by CLIP: 1 is first, 0.5 is chance.

    Pictures of one shot have nearly the same captions, so a rank says little of one of them, and much of many.

    Args:
        pictures: CLIP's vectors of pictures, each of length 1.
        captions: Those of their captions.

    Returns:
        The mean rank; None where there are too few pictures to tell, or all captions fit all of them alike, as in one
        long shot.

    Raises:
        AlignmentError: The captions fit their own pictures no better than those of others.
    """
    count = len(pictures)
    if count < MIN_PICTURES:
        return None
    fits = pictures @ captions.T
    if fits.std(axis=1).mean() < MIN_SPREAD:
        return None
    own = np.diagonal(fits)[:, None]
    below, level = (fits < own).sum(1), (fits == own).sum(1) - 1
    rank = float(np.mean((below + level / 2) / (count - 1)))
    if rank < 0.5 + CHANCE_DEVIATIONS / np.sqrt(12 * count):
        raise AlignmentError(
            f"captions fit their own pictures no better than those of others (mean rank {rank:.2f} of {count}, 0.5 is "
            "chance): answers may stand beside the wrong pictures, none is kept"
        )
    return rank


def cut_out(
    image: UInt8[np.ndarray, "height width 3"],
    box: Mapping[str, float],
    mask: UInt8[np.ndarray, "rows columns"] | None,
) -> UInt8[np.ndarray, "rows columns 3"]:
    """A person's part of a picture, grey where the mask says that it is something else.

    Args:
        image: RGB.
        box: `x0`, `y0`, `x1`, `y1` in pixels.
        mask: 0..255, the size of the box rounded out to whole pixels; None keeps the background.
    """
    height, width = image.shape[:2]
    left, top = int(np.floor(box["x0"])), int(np.floor(box["y0"]))
    right, bottom = int(np.ceil(box["x1"])), int(np.ceil(box["y1"]))
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
    part = image[y0:y1, x0:x1]
    if mask is None:
        return part
    weight = mask[y0 - top : y1 - top, x0 - left : x1 - left, None].astype(np.float32) / 255
    return np.round(weight * part + (1 - weight) * GREY).astype(np.uint8)


def encode_jpeg(image: UInt8[np.ndarray, "height width 3"]) -> bytes:
    """An RGB picture as JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "jpeg", quality=JPEG_QUALITY)
    return buffer.getvalue()
