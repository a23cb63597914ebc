"""Every tokenizer small enough for tests: options of its Config that keep its structure."""

TINY = {
    "alit": None,
    "alto": None,
    "cat": None,
    "flextok": None,
    "karl": None,
    "one-d-piece": None,
    "ordered": None,
    "reptok": None,
    "restok": None,
    "retok": None,
    "ta-titok": None,
    "titok": None,
}
