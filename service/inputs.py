"""From the inputs of a request to what a trunk eats, without holding up the event loop.

Short texts are tokenised at once, for a thread would cost more than they do; long ones and images
wait in a line of their own before as many threads as there are cores. So they are let in or
refused, and take their turns by lane and model, before anything is spent on them, as rows do before
a trunk. An input that cannot be used becomes an error in its own place.

Not here: how it is done (core.preprocessing), the line (service.line).
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from core.errors import GraftError, InvalidRequest
from core.preprocessing import ImagePreprocessor, Prepared, TextPreprocessor
from service.caller import Lane
from service.line import Line
from service.line_request import Request
from service.live_trunks import LiveTrunk
from service.row_queue import Model, Row

SHORT_TEXT_CHARS = 4_000
"""Characters of a request that are tokenised at once: some two milliseconds."""

IMAGE_COST, BYTES_PER_COST = 1_000, 32
TEXT_COST, CHARS_PER_COST = 20, 2
"""About how many microseconds an image or a text takes, beside its size: shares of turns are
reckoned by it, and what it truly takes is measured. A decoded image says only later what it was."""

TURN_COST = 2_000
"""What a thread takes at a time: texts of as many characters as are short, or one image."""


@dataclass(frozen=True)
class ImageInput:
    """One encoded image, or its base64 text, to be decoded off the event loop."""

    data: bytes | str


Input = str | ImageInput


@dataclass(frozen=True)
class Undecoded:
    """One input that waits to be prepared."""

    prepare: Callable[[], Prepared | GraftError]
    cost: int


class InputPreparer:
    """Prepares inputs for whichever trunk reads them; owns the threads that do."""

    def __init__(self, *, threads: int, max_text_chars: int, max_queued_rows: int) -> None:
        self._max_text_chars = max_text_chars
        self._line: Line[Undecoded, Prepared] = Line(
            "decode",
            _prepare,
            budget=TURN_COST,
            max_queued_rows=max_queued_rows,
            full_batch_seconds=TURN_COST / 1e6,
            threads=threads,
        )

    async def prepare(
        self,
        trunk: LiveTrunk,
        inputs: Sequence[Input],
        deadline: float,
        *,
        model: Model = None,
        lane: Lane = Lane.NORMAL,
    ) -> list[Prepared | GraftError]:
        """Return each input prepared for a trunk, or what is wrong with it.

        `deadline`, on the clock of `time.monotonic`, is that of the whole request: what would wait
        too long before the trunk is not begun either. `model` is whose turn they take. Raises
        `Overloaded` and `DeadlineExceeded` for what is not prepared at once.
        """
        preprocessor = trunk.trunk.preprocessor
        prepare: Callable[[Input], Prepared | GraftError]
        if isinstance(preprocessor, TextPreprocessor):
            prepare = partial(self._text, preprocessor)
            if sum(len(item) for item in inputs if isinstance(item, str)) <= SHORT_TEXT_CHARS:
                return [prepare(item) for item in inputs]
        else:
            prepare = partial(_image, preprocessor)
        waiting = [Undecoded(partial(prepare, item), _cost(item)) for item in inputs]
        seconds_after = trunk.batcher.wait_seconds(model, lane)
        return await self._line.answer(
            Request(waiting, deadline, model, lane, seconds_after=seconds_after)
        )

    async def close(self) -> None:
        """Refuse what waits, and end the threads."""
        await self._line.close()

    def _text(self, preprocessor: TextPreprocessor, item: Input) -> Prepared | GraftError:
        if not isinstance(item, str):
            return InvalidRequest("this model reads text; send a string", param="inputs")
        if not item.strip():
            return InvalidRequest("the text is empty", param="inputs")
        if len(item) > self._max_text_chars:
            return InvalidRequest(
                f"the text is longer than {self._max_text_chars} characters", param="inputs"
            )
        try:
            return preprocessor.prepare(item)
        except (TypeError, UnicodeEncodeError):  # what tokenizers say to it, by version
            return InvalidRequest("the text holds half a surrogate pair", param="inputs")


def _prepare(rows: Sequence[Row[Undecoded]]) -> list[Prepared | GraftError]:
    return [row.item.prepare() for row in rows]


def _cost(item: Input) -> int:
    if isinstance(item, ImageInput):
        return IMAGE_COST + len(item.data) // BYTES_PER_COST
    return TEXT_COST + len(item) // CHARS_PER_COST


def _image(preprocessor: ImagePreprocessor, item: Input) -> Prepared | GraftError:
    if not isinstance(item, ImageInput):
        return InvalidRequest(
            'this model reads images; send {"image": "<base64>"}, or for embeddings a data URL',
            param="inputs",
        )
    try:
        data = item.data
        if isinstance(data, str):
            data = base64.b64decode(data, validate=True)
        return preprocessor.prepare(data)
    except (binascii.Error, UnicodeEncodeError, ValueError):
        return InvalidRequest("the image is not valid base64", param="inputs")
    except GraftError as error:
        return InvalidRequest(error.message, param="inputs", code=error.error_code)
