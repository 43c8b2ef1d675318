"""From a command line to a configuration, and from errors to messages and exit statuses.

command        what all commands share: errors, exit statuses, logging
signals        SIGTERM and SIGUSR1, which ask a run to stop, and Ctrl-C
compose        a command line -> a checked configuration, by Hydra
settings       whether a value fits its setting
run_name       what a run is called that is given no name
run_folder     the folder of the run that a command reads
sweep          settings with several values, a run for each
reference      what each setting means, for --help and docs/settings.md
settings_file  the settings of a run, to begin another one with
config_folders where they are: this project's, and the user's
config_files   what is wrong with a configuration file, by line
pretrained     the settings of a run that starts from a Hugging Face checkpoint
"""
