"""vLLM's CPU build as verl's rollout engine: the same name (``vllm``), another weight-sync extension."""

from verl.workers.rollout.replica import RolloutReplicaRegistry

from rema_verl.platforms import cpu


def _load() -> type:
    import ray
    from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica

    class CPUvLLMHttpServer(vLLMHttpServer):
        def _get_worker_extension_cls(self) -> str:
            return "rema_verl.platforms.vllm_cpu_worker.CPUWorkerExtension"

    class CPUvLLMReplica(vLLMReplica):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.server_class = ray.remote(CPUvLLMHttpServer)

    return CPUvLLMReplica


if cpu.chosen():
    RolloutReplicaRegistry.register("vllm", _load)
