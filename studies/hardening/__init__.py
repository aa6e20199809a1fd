"""Does a penalty on the route harden, and more than on others? ``python -m studies.hardening``; docs/hardening.md.

:mod:`studies.hardening.plan` says what is compared, :mod:`studies.hardening.study` trains, chooses lambda and judges.
``attackroute reproduce table2`` and ``table3`` read what it writes.
"""
