"""The Open Inference Protocol v2 (`/v2`), with its binary tensor and model repository extensions.

    messages    what JSON the protocol exchanges, as pydantic models
    tensors     bytes and lists to arrays and back
    endpoints   HTTP to the data plane and back
    repository  what is live, and why something is not

https://github.com/open-inference/open-inference-protocol; the extensions as Triton documents them.
"""
