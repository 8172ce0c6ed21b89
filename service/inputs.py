"""From the inputs of a request to what a trunk eats, without holding up the event loop.

Short texts are tokenised at once, for a thread would cost more than they do; long ones and images
go to threads, no more at a time than there are cores. An input that cannot be used becomes an error
in its own place. Not here: how it is done (core.preprocessing).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from core.errors import DeadlineExceeded, GraftError, InvalidRequest
from core.preprocessing import ImagePreprocessor, Prepared, Preprocessor, TextPreprocessor

SHORT_TEXT_CHARS = 4_000
"""Characters of a request that are tokenised at once: some two milliseconds."""


@dataclass(frozen=True)
class ImageInput:
    """One encoded image, or its base64 text, to be decoded off the event loop."""

    data: bytes | str


Input = str | ImageInput


class InputPreparer:
    """Prepares inputs for whichever trunk reads them; owns the threads that do."""

    def __init__(self, *, threads: int, max_text_chars: int) -> None:
        self._max_text_chars = max_text_chars
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    async def prepare(
        self, preprocessor: Preprocessor, inputs: Sequence[Input], timeout_seconds: float
    ) -> list[Prepared | GraftError]:
        """Return each input prepared, or what is wrong with it; raise `DeadlineExceeded`."""
        prepare: Callable[[Input], Prepared | GraftError]
        if isinstance(preprocessor, TextPreprocessor):
            prepare = partial(self._text, preprocessor)
            if sum(len(item) for item in inputs if isinstance(item, str)) <= SHORT_TEXT_CHARS:
                return [prepare(item) for item in inputs]
        else:
            prepare = partial(_image, preprocessor)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout_seconds):
                return await asyncio.gather(
                    *(loop.run_in_executor(self._executor, prepare, item) for item in inputs)
                )
        except TimeoutError:
            raise DeadlineExceeded("the inputs were not decoded before the deadline") from None

    def close(self) -> None:
        """End the threads."""
        self._executor.shutdown(wait=False, cancel_futures=True)

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
