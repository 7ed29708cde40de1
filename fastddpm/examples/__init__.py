"""Trainers that people have, each as its own code has it, and the line of ours that makes it
faster: `python -m fastddpm.examples.NAME --data PATH`. What they share is in common.py.
"""
