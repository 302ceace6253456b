"""The engine process of a trainer: owns the accelerator, answers one front over a socket.

serve.py      the loop: frame in, method, frame out
protocol.py   the verbs of an engine, one per request of `homefire.wire.engine`
engine.py     those verbs over named slots: what both engines share
network.py    the numbers below it, in two implementations: torch_engine.py and fake.py
"""
