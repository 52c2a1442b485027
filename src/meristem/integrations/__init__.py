"""Growth in other people's training loops; one thin file each, loaded when it is asked
for.
"""
