/* A libnvidia-ml.so.1 that plays a script, for tests on machines without a driver.

   stub_script(text) sets it, one statement a line:

     init CODE                what nvmlInit returns (default 0)
     device UUID              a GPU; what follows, up to the next device, is of it
     mig UUID PARENT          a MIG instance of the GPU PARENT
     GETTER VALUE...          what successive calls give: a number, or !CODE for an error. The last one repeats, or
                              grows with each call where the line ends with +STEP, and wraps where it has %MODULUS
     closed CODE              what asking for this device's handle returns
     lost_after N             the Nth call of the getters that this device has and all later ones return GPU_IS_LOST

   A getter that the script does not name is not supported. */

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6, LOST = 15 };
enum { POWER_INSTANT = 186, CLOCK_SM = 1, MOST_VALUES = 64, MOST_DEVICES = 8 };

static const char *const NAMES[] = {"energy",   "power",   "instant",     "sm_util",       "memory_util", "sm_clock",
                                    "memory_clock", "temperature_v", "temperature", "events", "throttle", "memory"};
enum {
    ENERGY, POWER, INSTANT, SM_UTIL, MEMORY_UTIL, SM_CLOCK,
    MEMORY_CLOCK, TEMPERATURE_V, TEMPERATURE, EVENTS, THROTTLE, MEMORY, GETTERS
};

struct series {
    unsigned long long value[MOST_VALUES], step, modulus;
    int code[MOST_VALUES], count, next;
};

struct device {
    char uuid[96];
    struct device *parent; /* of a MIG instance */
    struct series series[GETTERS];
    int calls, lost_after, closed;
};

static struct device devices[MOST_DEVICES];
static int count, references, most_references, init_code;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static struct device *by_uuid(const char *uuid) {
    for (int i = 0; i < count; i++)
        if (!strcmp(devices[i].uuid, uuid)) return &devices[i];
    return NULL;
}

static void script_series(struct series *s, char **rest) {
    for (char *word; (word = strtok_r(NULL, " ", rest));) {
        if (*word == '+') s->step = strtoull(word + 1, NULL, 10);
        else if (*word == '%') s->modulus = strtoull(word + 1, NULL, 10);
        else if (s->count < MOST_VALUES) {
            s->code[s->count] = *word == '!' ? atoi(word + 1) : SUCCESS;
            s->value[s->count++] = *word == '!' ? 0 : strtoull(word, NULL, 10);
        }
    }
}

/* Returns 0, or the number of the line that it does not understand. Resets all counts. */
int stub_script(const char *text) {
    char *copy = strdup(text), *lines = copy, *line;
    int number = 0, bad = 0;
    memset(devices, 0, sizeof devices);
    count = references = most_references = init_code = 0;
    while (!bad && (line = strsep(&lines, "\n"))) {
        char *rest, *word = strtok_r(line, " ", &rest);
        struct device *last = count ? &devices[count - 1] : NULL;
        number++;
        if (!word) continue;
        if (!strcmp(word, "init")) init_code = atoi(strtok_r(NULL, " ", &rest));
        else if ((!strcmp(word, "device") || !strcmp(word, "mig")) && count < MOST_DEVICES) {
            snprintf(devices[count].uuid, sizeof devices[count].uuid, "%s", strtok_r(NULL, " ", &rest));
            if (!strcmp(word, "mig") && !(devices[count].parent = by_uuid(strtok_r(NULL, " ", &rest)))) bad = number;
            count++;
        } else if (last && !strcmp(word, "lost_after")) last->lost_after = atoi(strtok_r(NULL, " ", &rest));
        else if (last && !strcmp(word, "closed")) last->closed = atoi(strtok_r(NULL, " ", &rest));
        else {
            int g = 0;
            while (g < GETTERS && strcmp(word, NAMES[g])) g++;
            if (last && g < GETTERS) script_series(&last->series[g], &rest);
            else bad = number;
        }
    }
    free(copy);
    return bad;
}

int stub_references(void) { return references; }
int stub_most_references(void) { return most_references; }

static int told(struct device *d, int getter, unsigned long long *value) {
    struct series *s = &d->series[getter];
    int code = SUCCESS;
    pthread_mutex_lock(&lock);
    if (!references) code = UNINITIALIZED;
    else if (d->lost_after && (d->calls += s->count > 0) >= d->lost_after) code = LOST;
    else if (!s->count) code = NOT_SUPPORTED;
    else {
        int last = s->next == s->count - 1;
        code = s->code[s->next];
        *value = s->value[s->next];
        if (!last) s->next++;
        else if (s->step) {
            s->value[s->next] += s->step;
            if (s->modulus) s->value[s->next] %= s->modulus;
        }
    }
    pthread_mutex_unlock(&lock);
    return code;
}

static int told_uint(struct device *d, int getter, unsigned *out) {
    unsigned long long value = 0;
    int code = told(d, getter, &value);
    if (code == SUCCESS) *out = (unsigned)value;
    return code;
}

/* NVML */

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    if (init_code) return init_code;
    pthread_mutex_lock(&lock);
    if (++references > most_references) most_references = references;
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}

int nvmlShutdown(void) {
    int code = UNINITIALIZED;
    pthread_mutex_lock(&lock);
    if (references) references--, code = SUCCESS;
    pthread_mutex_unlock(&lock);
    return code;
}

int nvmlSystemGetDriverVersion(char *out, unsigned length) {
    if (!references) return UNINITIALIZED;
    snprintf(out, length, "570.26");
    return SUCCESS;
}

const char *nvmlErrorString(int code) {
    switch (code) {
        case NOT_SUPPORTED: return "Not Supported";
        case NO_PERMISSION: return "Insufficient Permissions";
        case LOST: return "GPU is lost";
        default: return "Another Error";
    }
}

static struct device *physical(unsigned index) {
    for (int i = 0; i < count; i++)
        if (!devices[i].parent && !index--) return &devices[i];
    return NULL;
}

int nvmlDeviceGetCount_v2(unsigned *out) {
    for (*out = 0; physical(*out); ++*out) continue;
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, struct device **out) {
    return (*out = physical(index)) ? SUCCESS : INVALID_ARGUMENT;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, struct device **out) {
    if (!references) return UNINITIALIZED;
    return (*out = by_uuid(uuid)) ? (*out)->closed : NOT_FOUND;
}

int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(struct device *d, struct device **out) {
    return (*out = d->parent) ? SUCCESS : INVALID_ARGUMENT;
}

int nvmlDeviceGetUUID(struct device *d, char *out, unsigned length) {
    snprintf(out, length, "%s", d->uuid);
    return SUCCESS;
}

int nvmlDeviceGetName(struct device *d, char *out, unsigned length) {
    snprintf(out, length, d->parent ? "Stub GPU MIG 1g" : "Stub GPU");
    return SUCCESS;
}

int nvmlDeviceGetTotalEnergyConsumption(struct device *d, unsigned long long *out) { return told(d, ENERGY, out); }
int nvmlDeviceGetPowerUsage(struct device *d, unsigned *out) { return told_uint(d, POWER, out); }
int nvmlDeviceGetCurrentClocksEventReasons(struct device *d, unsigned long long *out) { return told(d, EVENTS, out); }

int nvmlDeviceGetCurrentClocksThrottleReasons(struct device *d, unsigned long long *out) {
    return told(d, THROTTLE, out);
}

struct field_value {
    unsigned field, scope;
    int64_t timestamp, latency;
    int type, code;
    union { double d; unsigned u; unsigned long long ull; } value;
};

int nvmlDeviceGetFieldValues(struct device *d, int n, struct field_value *values) {
    for (int i = 0; i < n; i++) {
        values[i].type = 1;
        values[i].code =
            values[i].field == POWER_INSTANT ? told_uint(d, INSTANT, &values[i].value.u) : NOT_SUPPORTED;
    }
    return SUCCESS;
}

int nvmlDeviceGetUtilizationRates(struct device *d, unsigned *out) {
    int code = told_uint(d, SM_UTIL, &out[0]);
    return code ? code : told_uint(d, MEMORY_UTIL, &out[1]);
}

int nvmlDeviceGetClockInfo(struct device *d, int type, unsigned *out) {
    return told_uint(d, type == CLOCK_SM ? SM_CLOCK : MEMORY_CLOCK, out);
}

int nvmlDeviceGetTemperature(struct device *d, int sensor, unsigned *out) {
    (void)sensor;
    return told_uint(d, TEMPERATURE, out);
}

struct temperature { unsigned version; int sensor, value; };

int nvmlDeviceGetTemperatureV(struct device *d, struct temperature *out) {
    return told_uint(d, TEMPERATURE_V, (unsigned *)&out->value);
}

int nvmlDeviceGetMemoryInfo(struct device *d, unsigned long long *out) { /* total, free, used */
    out[0] = 1ULL << 40;
    int code = told(d, MEMORY, &out[2]);
    out[1] = out[0] - out[2];
    return code;
}
