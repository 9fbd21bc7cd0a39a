"""Faults injected into the real service, with a control for each that must fail.

    make torture                        every fault at full length, a line of JSON each
    python -m tests.torture NAMES...    some of them; --quick for the short form that `make test` runs

A fault is a function in one of the modules here, with the decorator `fault`. Results stand in docs/reliability.md.
"""
