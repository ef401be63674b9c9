"""``fedrx resume``: go on with a run that was interrupted or killed, to the same end."""

from functools import partial

from sim.runs import lifecycle
from sim.runs.federate import Federation
from sim.runs.paper import Paper
from sim.runs.single import Single

resume = partial(lifecycle.resume, kinds=(Single, Federation, Paper))
"""Go on with a run of any kind."""
