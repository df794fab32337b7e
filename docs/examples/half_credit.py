"""An outcome of one's own: half a point for a right answer that is not in a box."""

from rema_verl.rewards.grading import grade, last_boxed


def compute_score(data_source, solution_str, ground_truth, extra_info):
    correct = grade(solution_str, ground_truth).correct
    boxed = last_boxed(solution_str) is not None
    return {"score": correct * (1.0 if boxed else 0.5), "acc": float(correct)}
