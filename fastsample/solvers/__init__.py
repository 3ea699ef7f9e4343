"""Solvers: each a function that writes a plan's rows; one file a family."""

from .registry import Claim, build, get, names, options, register

__all__ = ["Claim", "build", "get", "names", "options", "register"]
