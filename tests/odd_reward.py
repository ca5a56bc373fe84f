"""A reward function for tests: whether an answer has an odd number of characters."""


def odd(problem, response):
    return float(len(response) % 2)
