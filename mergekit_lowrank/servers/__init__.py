"""What each server does with an adapter: which ranks and scalings it reads, what it drops, and what it refuses."""

from collections.abc import Mapping
from types import MappingProxyType

from mergekit_lowrank.servers.base import Server, Verdict
from mergekit_lowrank.servers.comfyui import ComfyUI
from mergekit_lowrank.servers.diffusers import Diffusers
from mergekit_lowrank.servers.llamacpp import LlamaCpp
from mergekit_lowrank.servers.sglang import SGLang
from mergekit_lowrank.servers.vllm import VLLM

__all__ = ["SERVERS", "Server", "Verdict", "accepted_ranks"]

SERVERS: Mapping[str, Server] = MappingProxyType(
    {server.name: server for server in (VLLM(), SGLang(), LlamaCpp(), Diffusers(), ComfyUI())}
)
"""By name, as ``output.target`` and ``check --target`` call them."""


def accepted_ranks(target: str) -> tuple[int, ...]:
    """The ranks that a server is started with, ascending; empty where it takes any."""
    return SERVERS[target].accepted_ranks
