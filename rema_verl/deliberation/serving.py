"""The frozen agents: verl's LLM servers, started standalone (no trainer), behind one ``generate``.

Ray and the servers live as long as the ``async with``. A reply depends on the request alone (each carries its own
sampling seed), not on what else is in flight, so that runs repeat and resume. A request that was made before is
answered from memory: policies that share their first round share its replies, and each is charged for them.
"""

import asyncio
import contextlib
import hashlib
import json
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from rema_verl.deliberation.team import PromptTooLong, Reply
from rema_verl.dialogue import neutralise
from rema_verl.errors import UserError


class ServingError(UserError):
    """A mistake the user can fix, found before a model is loaded. The message is one line."""


@dataclass(frozen=True)
class Serving:
    """Where and how the model is served."""

    model: str
    device: str = "gpu"
    gpus: int = 1  # per node; on cpu one worker
    nodes: int = 1
    tensor: int = 1  # GPUs that share one copy of the model
    context: int = 4096  # tokens of prompt and reply
    overrides: tuple[str, ...] = ()  # more of verl's options, k=v

    def compose(self):
        """verl's whole configuration for these servers.

        Raises:
            ServingError: an option that verl does not know.
        """
        from rema_verl.config.composing import compose

        cpu = self.device == "cpu"
        rollout = "actor_rollout_ref.rollout"
        options = [
            *(["+device=cpu"] if cpu else []),
            f"actor_rollout_ref.model.path={json.dumps(self.model)}",
            f"trainer.n_gpus_per_node={1 if cpu else self.gpus}",
            f"trainer.nnodes={1 if cpu else self.nodes}",
            f"{rollout}.name=vllm",
            f"{rollout}.nnodes={1 if cpu else self.nodes}",
            f"{rollout}.load_format=auto",  # verl's default is dummy: its trainers send the weights
            f"{rollout}.tensor_model_parallel_size={1 if cpu else self.tensor}",
            f"{rollout}.max_model_len={self.context}",
            f"{rollout}.prompt_length={self.context - 1}",
            f"{rollout}.response_length=1",  # every request has its own limit
            *([] if cpu else [f"{rollout}.gpu_memory_utilization=0.85"]),
            *self.overrides,
        ]
        try:
            return compose("rema_trainer", options)
        except UserError as e:
            raise ServingError(f"verl's options: {e}") from None


def load_tokenizer(model: str, where: str = "--model "):
    """The model's tokenizer, which must have a chat template; ``where`` names the option in errors.

    Raises:
        ServingError: no such model, or no chat template.
    """
    from transformers import AutoConfig, AutoTokenizer

    path = os.path.expanduser(model)
    try:
        AutoConfig.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as e:
        reason = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise ServingError(
            f"{where}{model}: cannot load it (no such folder, no access, or no network): {reason[:160]}"
        ) from None
    if not tokenizer.chat_template:
        raise ServingError(f"{where}{model}: the tokenizer has no chat template")
    return tokenizer


def fingerprint(model: str) -> str:
    """What tells two models of one path apart: names, sizes and times of a local folder's weight files."""
    path = os.path.expanduser(model)
    if not os.path.isdir(path):
        return model
    files = sorted(e.name for e in os.scandir(path) if e.name.endswith((".safetensors", ".bin", ".json")))
    stats = [(name, os.stat(os.path.join(path, name))) for name in files]
    digest = hashlib.sha256(repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]).encode())
    return digest.hexdigest()[:16]


@dataclass
class Client:
    """``await client(messages, seed=..., temperature=..., max_tokens=..., request_id=...) -> Reply``."""

    llm: Any
    tokenizer: Any
    context: int
    controls: tuple[str, ...] = ()  # what could pretend to end a message; see agent_loops/rema.py
    memory: dict[bytes, asyncio.Future] = field(default_factory=dict)

    async def __call__(
        self, messages: list[dict[str, str]], *, seed: int, temperature: float, max_tokens: int, request_id: str
    ) -> Reply:
        """One chat completion.

        Raises:
            ValueError: the prompt leaves no room for a reply.
        """
        key = hashlib.sha256(json.dumps([messages, seed, temperature, max_tokens]).encode()).digest()
        if key not in self.memory:
            self.memory[key] = asyncio.ensure_future(self._call(messages, seed, temperature, max_tokens, request_id))
        return await asyncio.shield(self.memory[key])

    def forget(self) -> None:
        """Drop the remembered replies."""
        self.memory = {key: reply for key, reply in self.memory.items() if not reply.done()}

    async def _call(self, messages, seed, temperature, max_tokens, request_id) -> Reply:
        # what others wrote, the question included, comes in user messages
        messages = [
            {**m, "content": neutralise(m["content"], self.controls)} if m["role"] == "user" else m for m in messages
        ]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) + max_tokens > self.context:
            raise PromptTooLong(f"a prompt of {len(ids)} tokens and a reply of {max_tokens} exceed {self.context}")
        output = await self.llm.generate(
            request_id,
            prompt_ids=ids,
            sampling_params={
                "temperature": temperature,
                "top_p": 1.0,
                "top_k": -1,
                "max_tokens": max_tokens,
                "seed": seed,
            },
        )
        if output.stop_reason == "aborted":
            raise RuntimeError(f"the server aborted request {request_id}")
        reply = list(output.token_ids)
        return Reply(
            self.tokenizer.decode(reply, skip_special_tokens=True),
            prompt_tokens=len(ids),
            tokens=len(reply),
            truncated=len(reply) >= max_tokens and reply[-1] not in self.tokenizer.all_special_ids,
        )


@contextlib.asynccontextmanager
async def serve(options: Serving, tokenizer) -> AsyncIterator[Client]:
    """Start Ray and the servers; stop them at the end."""
    import ray
    from omegaconf import OmegaConf
    from verl.trainer.constants_ppo import get_ppo_ray_runtime_env
    from verl.workers.rollout.llm_server import LLMServerManager

    from rema_verl.agent_loops.rema import control_strings
    from rema_verl.platforms import forkserver

    config = options.compose()
    forkserver.use_in(config)
    given = OmegaConf.to_container(config.ray_kwargs.get("ray_init") or OmegaConf.create({}), resolve=True)
    runtime = OmegaConf.merge(get_ppo_ray_runtime_env(config), given.pop("runtime_env", {}))
    ray.init(
        **given, runtime_env=OmegaConf.to_container(runtime), log_to_driver=bool(os.environ.get("REMA_VERL_DEBUG"))
    )
    try:
        servers = await asyncio.to_thread(LLMServerManager.create, config)
        yield Client(servers.get_client(), tokenizer, options.context, control_strings(tokenizer, {}))
    finally:
        ray.shutdown()
