"""How the processes of a job learn who they are, and find each other."""
