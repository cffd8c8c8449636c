"""Client of einsumd, DeepSeek-V4's FP8 attention output projection as a service.

    import einsumd

    with einsumd.Client("unix:/run/einsumd/einsumd.sock") as client:
        wo_a = client.weight("layers.3.attn.wo_a")
        einsumd.fp8_einsum("bhr,hdr->bhd", (a, a_scale), (wo_a, None), out, recipe=(1, 128, 128))

`import einsumd.torch` registers torch.ops.einsumd.fp8_einsum; `python -m einsumd.vllm --check` says
whether the installed vLLM can be routed here.
"""

from einsumd._client import (
    Client,
    Handle,
    Response,
    connect,
    default_client,
    fp8_einsum,
    set_default_client,
)
from einsumd._daemon import Daemon, Health, Info, Progress, SelfTest, Weight
from einsumd._errors import (
    Aborted,
    AlreadyExists,
    Cancelled,
    CopyRefused,
    DataLoss,
    DeadlineExceeded,
    Error,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    OutOfRange,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    Unknown,
)
from einsumd._tensors import copies

__all__ = [
    "Aborted",
    "AlreadyExists",
    "Cancelled",
    "Client",
    "CopyRefused",
    "Daemon",
    "DataLoss",
    "DeadlineExceeded",
    "Error",
    "FailedPrecondition",
    "Handle",
    "Health",
    "Info",
    "Internal",
    "InvalidArgument",
    "NotFound",
    "OutOfRange",
    "PermissionDenied",
    "Progress",
    "ResourceExhausted",
    "Response",
    "SelfTest",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "Unknown",
    "Weight",
    "connect",
    "copies",
    "default_client",
    "fp8_einsum",
    "set_default_client",
]
