"""verl on machines without an accelerator: the platform (``cpu``) and vLLM's CPU build as rollout engine."""
