# SPDX-License-Identifier: Apache-2.0
"""The processes, devices and threads that a job runs on."""
