"""Many files: which, and what becomes of each, many at a time on any executor.

What affects several jobs together lives here.  Nothing in this wing knows what is in a file; it hands `Options` on.

==========  ==================================================================
`jobs`      a job, its result, and one job done
`search`    which files of a folder are checkpoints, and what each becomes
`copies`    jobs whose adapters are for the same copy of the base model
`progress`  how far they are, in bytes
`pool`      processes that can be stopped, and end with their parent
`flight`    what is in work on an executor
`stream`    jobs in, results out
==========  ==================================================================
"""
