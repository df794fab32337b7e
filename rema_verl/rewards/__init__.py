"""Rewards: grading of answers in isolated processes, and verl reward managers that use it."""
