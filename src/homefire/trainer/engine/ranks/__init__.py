"""One training job over several processes: every rank holds a part of each parameter (FSDP2).

Rank 0 is the engine that the front speaks to. It runs the verbs (slots, plans, losses, checkpoints) as
a lone engine does, and below them, at the seam of `network.py`, every call is made by all ranks at once:

    rank 0   leader.py: sends the command and its rows to the others, does its own part, compares outcomes
    others   follower.py: one command after the other, until the link closes

commands.py     what rank 0 tells the others, over inherited sockets
rank_group.py   the collectives, with `torch.distributed`
rank_passes.py  a rank's part of a pass, which never leaves the others waiting (pass_collectives.py)
placement.py    which part of a slot's tensors a rank holds: the interface and the lone engine's answer
sharding.py     `fully_shard` over an unmodified model, and the placements of several ranks

Only numbers cross `torch.distributed`; commands, rows, logprobs and their derivatives use the links. A
rank that waits for work therefore waits on a socket, without a timeout, and sees rank 0's end as its
own.
"""
