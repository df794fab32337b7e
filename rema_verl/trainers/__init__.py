"""Trainer modes for verl's v1 trainer, and the watchdog that ends a run whose workers died."""
