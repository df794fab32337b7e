"""vLLM's CPU build as verl's rollout engine: the same name (``vllm``), another weight-sync extension."""

import multiprocessing
import os

from verl.workers.rollout.replica import RolloutReplicaRegistry

from rema_verl.platforms import cpu, forkserver


def _load() -> type:
    import ray
    from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica

    class CPUvLLMHttpServer(vLLMHttpServer):
        async def launch_server(self, *args, **kwargs):
            if stand_in := os.environ.get(forkserver.STAND_IN):  # vLLM spawns its engine: let that be a fork as well
                multiprocessing.set_executable(stand_in)
            return await super().launch_server(*args, **kwargs)

        def _get_worker_extension_cls(self) -> str:
            return "rema_verl.platforms.vllm_cpu_worker.CPUWorkerExtension"

    class CPUvLLMReplica(vLLMReplica):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.server_class = ray.remote(CPUvLLMHttpServer)

    return CPUvLLMReplica


if cpu.chosen():
    RolloutReplicaRegistry.register("vllm", _load)
