r"""The recipe of the packaged `toy` model: tables, data, model, training, and how it was measured.

It needs torch, numpy and safetensors alone; `measure` and `export` need tvlens. What was run, on
2026-11-22 on one NVIDIA H200 that two other runs shared, with torch 2.11.0::

    python -m recipes.toy --out DIR --seed 0 --steps 20000 --minutes 4.5 --named 0.4 --decay 0.3 \
        --checkpoints 0,100,200,300,500,800,1500,3000,6000
    python -m recipes.toy.export DIR 0 200 300 500 800 1500 3000 8856

The end is the first to come of ``--steps`` and ``--minutes``, and the learning rate, which falls over
the last third, follows the one that is nearer. There it was the minutes: they were over at step 8856.
``run.json`` is the log of that run; with its seconds in place of the clock (interpolated between lines)
the same steps get the same learning rates on any machine, however fast::

    python -m recipes.toy --out DIR --seed 0 --steps 20000 --minutes 4.5 --named 0.4 --decay 0.3 \
        --checkpoints 0,100,200,300,500,800,1500,3000,6000 --clock recipes/toy/run.json

The batches are then the same on the same kind of device. The weights need not be: half-precision sums
on a GPU depend on the card and the version of torch. On a CPU they are the same twice.

Two other runs beside it, measured in ``docs/models.md``: the defaults (``--named 0.25 --decay 0.1``,
ended at step 9028), alike on the tasks and worse on held-out items and tasks, and ``--steps 6000
--batch 256 --theta 0 --layer -1``, without the loss on theta. The packaged run was chosen of the first
two by accuracy on taught tasks, with demonstrations and with theta; what the runs do with what was
held out played no part.
"""
