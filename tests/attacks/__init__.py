"""What a stranger reads first: the promises of SECURITY.md, attacked.

SECURITY.md names for each promise the tests that hold it, and `test_promises` holds that they exist.  Most of them
stand beside what they test; here are those that attack the whole from outside, as somebody does who has a file, a name,
a server or a moment in his hands:

===================  ===========================================================
`test_promises`      the list is true
`test_names`         names of files, folders and objects
`test_servers`       what a server says, and what it leaves unsaid
`test_moments`       others at the same place at the same time; executors that go
===================  ===========================================================
"""
