"""Tiphys: pre-training for large decision models.

`import tiphys` is quick: each name below is imported when it is first used.
"""
