"""Every tolerance of the suite, with the reason for its size."""

EXACT = 1e-8
"""Relative, for float64 results that two routes reach by sums in another order. Products of a few hundred terms
lose about 1e-13; four digits more are left for cancellation between consumers."""

SAME_FUNCTION = 1e-10
"""Largest difference between the outputs (of order one) of two float64 networks that are the same function."""

SAME_IN_FLOAT32 = 1e-5
"""The same of float32 networks of a few layers: some sums of a hundred terms, each rounded to 6e-8."""

OTHER_FUNCTION = 1e-3
"""Least difference between the outputs (of order one) of two networks that are said to differ. Removing a channel
in front of a normaliser moves them by a tenth and more."""

STDERRS = 4.0
"""Standard errors that an estimate may lie from the truth: by chance one in 16,000 does, and seeds are fixed."""

HALVED = 0.1
"""Relative, for the ratio of two variances, each estimated from thousands of draws and averaged over units. The
standard error of one such ratio is about 4 %, that of their mean below 2 %."""

SOLVE = 1e-6
"""Relative, for two float64 solutions of one ridge problem: normal equations square the condition number (up to
1e4 here), an augmented least-squares solve does not."""

UNDAMPED = 1e-5
"""Absolute, for what a refit with ridge 0 leaves: it still damps by 1e-8 of the input variance to stay safe."""

WITHIN_BUDGET = 0.01
"""Share of the budget that may stay unused where every width is allowed."""

FLOAT32 = 1e-4
"""Absolute, for outputs (of order one) of one float32 network before and after a round trip that only reorders."""

MEASURED_VARIANCE = 0.03
"""Relative, for the variance of 20,000 uniform errors: its standard error is 0.6 %."""

STATED_ERROR = 0.15
"""Relative, for the spread of estimates over seeds against the standard errors they state, averaged over units. Of 60
seeds one spread is known to 9 %, and units of one net are not independent."""

RATE = 0.1
"""Relative, for the ratio of two gaps that fall as the square of the noise: what the next order adds at the sizes
tested is a few percent."""

STANDARDISED = 1e-4
"""Relative, for scores that take a standardised weight for free of its scale: the eps of 1e-6 that its variance is
given is 1e-5 of that."""
