"""The JSON of the Open Inference Protocol, under the names of its specification.

Fields that it does not know are passed over, as it asks of servers. Sizes are checked where tensors
are read (service.api.inference.tensors).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from core.datasets import Task

Count = Annotated[StrictInt, Field(ge=0, lt=1 << 40)]
Datatype = Literal["BYTES", "FP32"]


class InputParameters(BaseModel):
    """`binary_data_size`: how many of the bytes behind the JSON are this tensor."""

    model_config = ConfigDict(extra="ignore")

    binary_data_size: Count | None = None


class OutputParameters(BaseModel):
    """How one output is wanted; `classification` asks for the k likeliest classes as strings."""

    model_config = ConfigDict(extra="ignore")

    binary_data: StrictBool | None = None
    classification: Annotated[StrictInt, Field(ge=1, le=100_000)] | None = None


class RequestParameters(BaseModel):
    """`timeout` is in microseconds; of priorities 1 goes first, and 0 leaves it to the headers."""

    model_config = ConfigDict(extra="ignore")

    binary_data_output: StrictBool = False
    timeout: Annotated[StrictInt, Field(ge=1)] | None = None
    priority: Annotated[StrictInt, Field(ge=0)] = 0


class RequestInput(BaseModel):
    """A tensor that is sent: in `data`, flat or nested, or behind the JSON."""

    name: StrictStr
    shape: Annotated[list[Count], Field(min_length=1, max_length=8)]
    datatype: StrictStr
    parameters: InputParameters = InputParameters()
    data: list[Any] | None = None


class RequestOutput(BaseModel):
    """An output that is wanted."""

    name: StrictStr
    parameters: OutputParameters = OutputParameters()


class InferRequest(BaseModel):
    """The JSON of an inference request. Without `outputs`, all of them are returned."""

    id: StrictStr | None = None
    parameters: RequestParameters = RequestParameters()
    inputs: Annotated[list[RequestInput], Field(min_length=1, max_length=16)]
    outputs: Annotated[list[RequestOutput], Field(max_length=16)] = []


class ResponseOutput(BaseModel):
    """A tensor that is returned: `data` is flat, and absent when it is behind the JSON."""

    name: str
    shape: list[int]
    datatype: Datatype
    parameters: dict[str, int] | None = None
    data: list[float] | list[str] | None = None


class InferResponse(BaseModel):
    """The JSON of an inference's answer."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[ResponseOutput]


class TensorMetadata(BaseModel):
    """A tensor's name, datatype and shape; -1 is any number."""

    name: str
    datatype: Datatype
    shape: list[int]


class ModelMetadata(BaseModel):
    """What a model reads and gives. Send one of `inputs`.

    `labels` are the classes in the order of `probabilities`; of a multi-label model those are given
    whose probability reaches `threshold`. A regression has neither.
    """

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
    task: Task
    labels: list[str]
    threshold: float | None = None


class ServerMetadata(BaseModel):
    """Which server this is, and which extensions it has."""

    name: str
    version: str
    extensions: list[str]


class ServerLive(BaseModel):
    """Whether the process answers."""

    live: bool


class ServerReady(BaseModel):
    """Whether every model of the registry has been looked at."""

    ready: bool


class ModelReady(BaseModel):
    """Whether a model answers inferences."""

    name: str
    ready: bool


class RepositoryIndexRequest(BaseModel):
    """`ready`: list only what answers."""

    ready: StrictBool = False


class RepositoryEntry(BaseModel):
    """A version of a model, and if it is not served, why not."""

    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE"]
    reason: str


class RepositoryRequest(BaseModel):
    """`parameters` of a load or an unload; none has a meaning here."""

    parameters: dict[str, Any] = {}


class Nothing(BaseModel):
    """An empty answer: it is done."""


class InferenceError(BaseModel):
    """What went wrong."""

    error: str
