"""How the processes of a job learn who they are, and find each other.

dist_env   what the launcher has told a process, and that it ends with the launcher
store      where processes leave their addresses for each other, on one address alone
"""
