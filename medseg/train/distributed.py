"""Several processes that train one network, and the one process that is the usual case.

Every process holds the whole network and has a share of each batch. The loss on each is that of the
whole batch (`medseg.losses.sums`), the gradients are averaged: so N processes do what one does.
Numbers of the host, such as the place in the schedule, go from host to host; no accelerator is
waited for.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from medseg.errors import ConfigError, MedsegError
from medseg.losses.deep_supervision import resolution_weights
from medseg.train.schedule import Length

T = TypeVar("T")

LONGEST_WAIT = timedelta(hours=12)
"""Time after which a process gives up on the others. Only a hung machine takes so long: whoever
started the processes ends all of them when one dies."""
MEETING_WAIT = timedelta(minutes=10)
"""Time after which it gives up on processes that do not come in the beginning."""
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


class LostProcessError(MedsegError):
    """Another process of the run ended or fell silent; its own message says why."""

    exit_status = 3
    """What the process ends with: whoever started it looks for the cause elsewhere."""


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes that train one network, seen from one of them; by default there is one."""

    count: int = 1
    rank: int = 0
    """This process: 0 to count - 1. The first, the main one, writes the files."""
    local_rank: int = 0
    """Its number on its machine, and that of its GPU."""

    @property
    def is_main(self) -> bool:
        """Return whether this process writes the files."""
        return self.rank == 0

    def device_name(self, requested: str) -> str:
        """Return the device this process trains on, for `pick_device`.

        Raises:
            ConfigError: If the processes cannot have a device each.
        """
        if self.count == 1 or requested not in ("auto", "cuda"):
            if self.count > 1 and requested != "cpu":
                raise ConfigError(
                    f"device is {requested!r}, but {self.count} processes need one each; "
                    "expected auto, cuda or cpu. CUDA_VISIBLE_DEVICES chooses among GPUs."
                )
            return requested
        num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if num_gpus == 0 and requested == "auto":
            return "cpu"
        if self.local_rank >= num_gpus:
            raise ConfigError(
                f"process {self.local_rank + 1} of this machine has no GPU: it has {num_gpus}. "
                f"Start {num_gpus or 1} at most."
            )
        return f"cuda:{self.local_rank}"

    def positions(self, batch_size: int) -> tuple[int, ...] | None:
        """Return which samples of every batch are this process's; None: all, as it is alone.

        Shares are consecutive and differ by one sample at most.

        Raises:
            ConfigError: If there are more processes than samples.

        Examples:
            >>> Processes(2, 0).positions(5), Processes(2, 1).positions(5)
            ((0, 1, 2), (3, 4))
        """
        if self.count == 1:
            return None
        if batch_size < self.count:
            raise ConfigError(
                f"the batch has {batch_size} patch{'es' * (batch_size > 1)}, too few for "
                f"{self.count} processes; each needs one at least. Use {batch_size} or fewer "
                "GPUs, or a larger sampling.batch_size."
            )
        each, rest = divmod(batch_size, self.count)
        first = self.rank * each + min(self.rank, rest)
        return tuple(range(first, first + each + (self.rank < rest)))

    def wrap(self, network: nn.Module) -> Callable[[Tensor], Any]:
        """Return the network; after a backward pass its gradients are the means over processes.

        A network that learns other parameters from now on is wrapped anew; the old wrapper must be
        gone by its next step.
        """
        return network if self.count == 1 else _Averaged(network, self)

    def sum_over(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over the processes, without a gradient."""
        total = tensor.detach().clone()
        if self.count > 1:
            dist.all_reduce(total)
        return total

    def agree(self, length: Length) -> None:
        """Let every process stand at the main one's place in the schedule.

        Nothing is said where the place depends on the number of steps alone.
        """
        if self.count > 1 and length.budget_seconds is not None:
            place = torch.tensor(length.progress, dtype=torch.float64)
            dist.broadcast(place, 0)
            length.progress = float(place)

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process; all learn it at the same step."""
        return self.largest(int(flag)) > 0

    def largest(self, number: int) -> int:
        """Return the largest of the processes' numbers."""
        if self.count == 1:
            return number
        found = torch.tensor(number, dtype=torch.int64)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def wait(self) -> None:
        """Wait until every process has come here."""
        self.largest(0)

    def from_main(self, make: Callable[[], T]) -> T:
        """Let the main process make a value, which all of them get; the others wait.

        Args:
            make: Gives a JSON value.

        Raises:
            LostProcessError: In the others, if `make` raised in the main one.
        """
        if self.count == 1:
            return make()
        if not self.is_main:
            answer = _received()
            if answer["failed"]:
                raise LostProcessError("The main process of this run failed.")
            value: T = answer["value"]
            return value
        try:
            made = make()
        except BaseException:
            _send({"failed": True})
            raise
        _send({"failed": False, "value": made})
        return made

    def require_same_weights(self, network: nn.Module) -> None:
        """Check that every process starts from the same weights.

        Raises:
            MedsegError: In all processes, if they do not.
        """
        mark = _mark(network.state_dict())
        if self.largest(mark) != -self.largest(-mark):
            raise MedsegError(
                f"the {self.count} processes of this run hold different weights. They must see "
                "the same run folder, the same model to start from and the same version of "
                "medseg."
            )


def from_environment(environment: Mapping[str, str]) -> Processes | None:
    """Return the processes that a launcher such as torchrun started; None where none did.

    Args:
        environment: Variables of the process; torchrun sets RANK, WORLD_SIZE and LOCAL_RANK.

    Raises:
        ConfigError: If they contradict each other, with every problem.

    Examples:
        >>> from_environment({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"})
        Processes(count=2, rank=1, local_rank=1)
    """
    if environment.get("WORLD_SIZE", "1").strip() == "1":
        return None
    problems, found = [], {}
    for name in _VARIABLES:
        text = environment.get(name)
        if text is None:
            problems.append(f"{name} is missing")
        elif not text.strip().isdigit():
            problems.append(f"{name} is {text!r}; expected a number")
        else:
            found[name] = int(text)
    count, rank = found.get("WORLD_SIZE", 1), found.get("RANK", 0)
    if not problems and rank >= count:
        problems.append(f"RANK is {rank}, WORLD_SIZE {count}; expected a rank below {count}")
    if problems:
        raise ConfigError(
            f"the environment describes several processes, but wrongly: {'; '.join(problems)}. "
            "Start them with --gpus or torchrun, or unset WORLD_SIZE."
        )
    return Processes(count, rank, found["LOCAL_RANK"])


def current() -> Processes:
    """Return the processes that are joined at present."""
    if not (dist.is_available() and dist.is_initialized()):
        return Processes()
    rank = dist.get_rank()
    return Processes(dist.get_world_size(), rank, dist.get_node_local_rank(fallback_rank=rank))


@contextmanager
def joined(
    processes: Processes, device: torch.device, *, meeting: str = "env://"
) -> Iterator[None]:
    """Connect the processes for the length of a `with` block; they leave it together.

    After an error the connections are left to the end of the process: taking them down on an
    accelerator would wait for processes that do not come.

    Args:
        processes: They; one alone needs no connection.
        device: Where this one computes.
        meeting: Where they find each other; "env://" is what a launcher wrote into the environment.

    Raises:
        LostProcessError: If another process does not come, or is lost.
    """
    if processes.count == 1:
        yield
        return
    is_cuda = device.type == "cuda"
    try:
        if is_cuda:
            torch.cuda.set_device(device)
        store, rank, count = next(
            rendezvous(meeting, processes.rank, processes.count, timeout=MEETING_WAIT)
        )
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if is_cuda else "gloo",
            store=store,
            rank=rank,
            world_size=count,
            timeout=LONGEST_WAIT,
        )
        processes.wait()
        with warnings.catch_warnings():
            # Said of kernels of one voxel, for which all orders in memory are one.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view")
            yield
        processes.wait()
    except (RuntimeError, ValueError) as error:
        if not isinstance(error, MedsegError) and _is_lost(error):
            raise LostProcessError(
                f"process {processes.rank + 1} of {processes.count} has lost the others: one of "
                "them ended, or they cannot reach each other. What ended it stands in its own "
                f"output. ({_first_line(error)})"
            ) from error
        raise
    finally:
        if dist.is_initialized() and not is_cuda:
            dist.destroy_process_group()
    if is_cuda:
        dist.destroy_process_group()


class _Averaged:
    """A network whose gradients are averaged over the processes.

    The machinery is built at the first batch, when the weights are those that are trained: a
    checkpoint has been read, a faster form of the network chosen.
    """

    def __init__(self, network: nn.Module, processes: Processes) -> None:
        self._network, self._processes = network, processes
        self._parallel: DistributedDataParallel | None = None

    def __call__(self, images: Tensor) -> Any:
        """Run the network on this process's share of the batch."""
        if self._parallel is None:
            self._processes.require_same_weights(self._network)
            silent = silent_parameters(self._network, images[:1])
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # type: ignore[no-untyped-call]
                self._network, silent
            )
            self._parallel = DistributedDataParallel(self._network, gradient_as_bucket_view=True)
        return self._parallel(images)


def silent_parameters(network: nn.Module, images: Tensor) -> list[str]:
    """Return the parameters that learn nothing: no logits that count depend on them.

    The lowest resolution of deep supervision has weight 0, so its logit layer never has a gradient.
    Averaging must not wait for it.

    Args:
        network: Any network; of a compiled one the original is looked at.
        images: (B, C, *spatial), an example; only whether gradients exist is asked, so B = 1 does.
    """
    original = getattr(network, "_orig_mod", network)
    was_training = original.training
    original.eval()
    with torch.enable_grad():
        logits = original(images)
        several = [logits] if isinstance(logits, Tensor) else list(logits)
        weights = resolution_weights(len(several))
        sums = [one.float().sum() for one, w in zip(several, weights, strict=True) if w]
        named = {name: p for name, p in network.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(
            torch.stack(sums).sum(), list(named.values()), allow_unused=True
        )
    original.train(was_training)
    return [name for name, found in zip(named, gradients, strict=True) if found is None]


def _mark(tensors: Mapping[str, Tensor]) -> int:
    """Return a positive number that follows every bit of the tensors."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.removeprefix("_orig_mod.").encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return int.from_bytes(digest.digest()[:7], "big")


def _send(value: Any) -> None:
    """Send a JSON value from the main process to the others."""
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    dist.broadcast(torch.tensor(len(text)), 0)
    dist.broadcast(text, 0)


def _received() -> Any:
    """Return the JSON value that the main process sends."""
    length = torch.tensor(0)
    dist.broadcast(length, 0)
    text = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(text, 0)
    return json.loads(bytes(text.numpy()))


def _is_lost(error: Exception) -> bool:
    """Return whether an error comes from the connection between the processes."""
    words = ("gloo", "Connection closed by peer", "Connection reset", "NCCL", "Broken pipe")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def _first_line(error: Exception) -> str:
    """Return the first sentence of a message, without the place in the library's source."""
    text = re.sub(r"^\[\S*\] ", "", str(error)) or type(error).__name__
    return text.splitlines()[0].partition(". ")[0][:200]
