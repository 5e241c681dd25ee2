/*
 * The load driver of compare.py: SMTP sessions over raw sockets, to 127.0.0.1 alone.
 *
 *     driver WORK PORT SESSIONS IDLE SECONDS COUNT LIMIT
 *
 * WORK      a unit is ...
 *   session   connect, EHLO, one message of 1 kB, QUIT, the server's close
 *   split     the same; the final dot in a write of its own, Nagle's algorithm left on
 *   open      one message of 1 kB in a session that stays open
 *   lines     one message of 30 MB in lines of 78 octets
 *   dots      one message of 30 MB in lines of 5 octets that begin with a (doubled) dot
 *   long      one message of 30 MB in lines of 1 MB
 *   noop      64 KB of NOOP, pipelined
 *   rcpt      64 KB of RCPT, pipelined, a new transaction after each 990 recipients
 *   burst     SESSIONS connects at once, until all are greeted
 * SESSIONS  how many work at the same time
 * IDLE      connections that are opened and greeted, and say nothing
 * SECONDS   start no unit after this time
 * COUNT     start no more units than this
 * LIMIT     seconds after which the driver gives up, whatever it waits for
 *
 * It opens the sessions, warms up, prints "ready" and waits for a line on its standard input;
 * then it measures, prints one line of JSON, and closes at the end of its input. (compare.py
 * reads the server's CPU clock at these two moments.) "busy" is the share of the time that the
 * driver itself was on its core: well below 1, or the driver was what held the rate down.
 */
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BIG 30000000
#define MAX_SESSIONS 1000
#define MAX_TIMES 1000000
#define UNTIL_CLOSE -1          /* instead of a number of replies */

struct step {                   /* what a session says, then how many replies it waits for */
    const char *text;
    size_t length;
    int replies;
};

struct session {
    int fd;                     /* -1: not connected */
    int step;                   /* where in the plan it is */
    int resting;                /* between two units */
    size_t sent;                /* octets of this step's text */
    int replies;                /* that came in this step */
    int column;                 /* of the reply line that is coming in */
    char line[80];              /* its beginning */
    double began;               /* this unit */
};

static struct step plan[10];
static int plan_length, first_step;     /* a unit begins at first_step */
static int port, nagle, sessions_wanted;
static struct session sessions[MAX_SESSIONS];
static double give_up;                  /* the time to do so */
static double times[MAX_TIMES];         /* of the units */
static int units, units_begun, idle_refused;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static double cpu_time(void)
{
    struct rusage use;
    getrusage(RUSAGE_SELF, &use);
    return use.ru_utime.tv_sec + use.ru_stime.tv_sec
        + (use.ru_utime.tv_usec + use.ru_stime.tv_usec) / 1e6;
}

/* Tell compare.py why there is no figure, and end. */
static void fail(const char *format, ...)
{
    char text[200];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    for (char *p = text; *p; p++)
        if (*p < ' ' || *p > '~' || *p == '"' || *p == '\\')
            *p = '?';
    printf("{\"error\": \"%s\"}\n", text);
    exit(1);
}

static int new_socket(void)
{
    int on = 1, fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0)
        fail("socket: %s", strerror(errno));
    if (!nagle)
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    return fd;
}

static int connect_socket(int fd)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return connect(fd, (struct sockaddr *)&address, sizeof address);
}

/* ---- the plan of a session ---- */

static void add_step(const char *text, int replies)
{
    plan[plan_length++] = (struct step){text, strlen(text), replies};
}

/* Text of about `size` octets made of one line, then `end`. */
static char *repeat(const char *line, size_t size, const char *end)
{
    size_t length = strlen(line), count = size / length;
    char *text = malloc(count * length + strlen(end) + 1);
    for (size_t i = 0; i < count; i++)
        memcpy(text + i * length, line, length);
    strcpy(text + count * length, end);
    return text;
}

static const char *message(const char *work)
{
    static char line[1000001];
    if (!strcmp(work, "lines")) {
        memset(line, 'x', 76);
        return repeat(strcat(line, "\r\n"), BIG, ".\r\n");
    }
    if (!strcmp(work, "dots"))
        return repeat("..x\r\n", BIG, ".\r\n");
    if (!strcmp(work, "long")) {
        memset(line, 'x', 999998);
        return repeat(strcat(line, "\r\n"), BIG, ".\r\n");
    }
    strcpy(line, "From: <a@example.com>\r\nTo: <b@example.com>\r\nSubject: test\r\n\r\n");
    return strcat(strcpy(malloc(1200), line), repeat(
        "The quick brown fox jumps over the lazy dog, and then sleeps.\r\n", 960,
        strcmp(work, "split") ? ".\r\n" : ""));
}

static void make_plan(const char *work)
{
    const char *mail = "MAIL FROM:<alice@example.com>\r\n";
    int whole_session = !strcmp(work, "session") || !strcmp(work, "split");

    add_step("", 1);                                    /* the banner */
    if (!strcmp(work, "burst")) {
        first_step = 1;
        return;
    }
    add_step("EHLO client.example.com\r\n", 1);
    first_step = whole_session ? 0 : 2;
    if (!strcmp(work, "noop")) {
        add_step(repeat("NOOP\r\n", 65536, ""), 65536 / 6);
    } else if (!strcmp(work, "rcpt")) {
        char *text = malloc(66000), *p = text;
        int lines = 0;
        while (p - text < 65450) {
            if (lines % 992 == 0) {                     /* some servers allow 1000 recipients */
                p += sprintf(p, "RSET\r\n%s", mail);
                lines += 2;
            }
            p += sprintf(p, "RCPT TO:<u%d@example.com>\r\n", lines++);
        }
        add_step(text, lines);
    } else {
        add_step(mail, 1);
        add_step("RCPT TO:<bob@example.com>\r\n", 1);
        add_step("DATA\r\n", 1);
        if (!strcmp(work, "split")) {
            add_step(message(work), 0);
            add_step(".\r\n", 1);
        } else {
            add_step(message(work), 1);
        }
        if (whole_session)
            add_step("QUIT\r\n", UNTIL_CLOSE);
    }
}

/* ---- a session ---- */

static void open_session(struct session *s)
{
    s->fd = new_socket();
    fcntl(s->fd, F_SETFL, O_NONBLOCK);
    if (connect_socket(s->fd) && errno != EINPROGRESS)
        fail("connect: %s", strerror(errno));
}

static void begin_step(struct session *s, int step)
{
    s->step = step;
    s->sent = 0;
    s->replies = 0;
}

/* Say what can be said now, as long as no reply has to come first. */
static void speak(struct session *s)
{
    for (;;) {
        struct step *step = &plan[s->step];
        while (s->sent < step->length) {
            ssize_t n = send(s->fd, step->text + s->sent, step->length - s->sent, MSG_NOSIGNAL);
            if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
                return;
            if (n < 0)
                fail("send: %s", strerror(errno));
            s->sent += n;
        }
        if (step->replies == UNTIL_CLOSE ? s->fd >= 0 : s->replies < step->replies)
            return;
        begin_step(s, s->step + 1);
        if (s->step == plan_length) {                   /* a unit is done */
            if (s->began && units < MAX_TIMES)
                times[units++] = now() - s->began;
            begin_step(s, first_step);
        }
        if (s->step == first_step) {
            s->resting = 1;
            return;
        }
    }
}

static void begin_unit(struct session *s)
{
    s->resting = 0;
    s->began = now();
    if (s->fd < 0)
        open_session(s);
    speak(s);
}

static void listen_to(struct session *s)
{
    static char input[1 << 17];
    ssize_t n = recv(s->fd, input, sizeof input, 0);
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
        return;
    if (n < 0)
        fail("recv: %s", strerror(errno));
    if (n == 0) {
        if (plan[s->step].replies != UNTIL_CLOSE || !s->replies)
            fail("the server closed the connection");
        close(s->fd);
        s->fd = -1;
        s->column = 0;
    }
    for (ssize_t i = 0; i < n; i++) {
        if (s->column < (int)sizeof s->line - 1)
            s->line[s->column++] = input[i];
        if (input[i] == '\n') {
            s->line[s->column] = 0;
            if (s->line[0] != '2' && s->line[0] != '3')
                fail("refused: %.60s", s->line);
            if (s->line[3] != '-')
                s->replies++;
            s->column = 0;
        }
    }
}

/* ---- many sessions ---- */

/* Begin units until the time or the count is up; come back when the last one is done. */
static int run(double seconds, int count)
{
    struct pollfd polled[MAX_SESSIONS];
    double stop = now() + seconds;

    units = units_begun = 0;
    for (;;) {
        int working = 0, greeted = 0;
        double time = now();
        for (int i = 0; i < sessions_wanted; i++) {
            struct session *s = &sessions[i];
            if (s->resting && units_begun < count && time < stop) {
                units_begun++;
                begin_unit(s);
            }
            polled[i].fd = s->resting ? -1 : s->fd;
            polled[i].events = POLLIN | (s->sent < plan[s->step].length ? POLLOUT : 0);
            working += !s->resting;
            greeted += s->resting;
        }
        if (!working)
            return sessions_wanted;
        if (time > give_up) {
            if (sessions_wanted > 4)                    /* a burst */
                return greeted;
            fail("no answer");
        }
        poll(polled, sessions_wanted, 100);
        for (int i = 0; i < sessions_wanted; i++) {
            if (polled[i].fd < 0 || !polled[i].revents)
                continue;
            if (polled[i].revents & ~POLLOUT)
                listen_to(&sessions[i]);
            speak(&sessions[i]);
        }
    }
}

/* One after another, since some servers lose connections in a burst. */
static void open_idle(int count)
{
    struct timeval limit = {5, 0};
    char banner[512];

    for (int i = 0; i < count; i++) {
        int fd = new_socket();
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
        if (now() > give_up)
            fail("idle connections: %d of %d opened in the time", i, count);
        if (connect_socket(fd) || recv(fd, banner, sizeof banner, 0) <= 0)
            fail("gone at idle connection %d", i + 1);
        if (banner[0] != '2') {
            idle_refused++;
            close(fd);
        }
    }
}

static int compare_times(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv)
{
    char line[80];

    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc != 8)
        fail("usage: driver WORK PORT SESSIONS IDLE SECONDS COUNT LIMIT");
    const char *work = argv[1];
    port = atoi(argv[2]);
    sessions_wanted = atoi(argv[3]);
    int idle = atoi(argv[4]), count = atoi(argv[6]);
    double seconds = atof(argv[5]), limit = atof(argv[7]);
    if (sessions_wanted < 1 || sessions_wanted > MAX_SESSIONS)
        fail("1 to %d sessions", MAX_SESSIONS);
    int burst = !strcmp(work, "burst"), small = !strcmp(work, "session")
        || !strcmp(work, "split") || !strcmp(work, "open");
    nagle = !strcmp(work, "split");
    make_plan(work);
    give_up = now() + limit;
    alarm(limit + 10);                                  /* if all else fails */

    for (int i = 0; i < sessions_wanted; i++) {
        sessions[i].fd = -1;
        sessions[i].resting = first_step == 0 || burst;
        if (!sessions[i].resting)
            open_session(&sessions[i]);
    }
    run(0, 0);                                          /* up to first_step */
    open_idle(idle);
    if (small)
        run(0.2, count);                                /* warm up */
    else if (!strcmp(work, "noop") || !strcmp(work, "rcpt"))
        run(1, 1);

    puts("ready");
    if (!fgets(line, sizeof line, stdin))
        return 1;
    double cpu = cpu_time(), start = now();
    if (burst)
        count = sessions_wanted;
    int greeted = run(seconds, count);
    double elapsed = now() - start, busy = (cpu_time() - cpu) / elapsed;
    qsort(times, units, sizeof *times, compare_times);
    printf("{\"units\": %d, \"seconds\": %.6f, \"busy\": %.3f, \"median\": %.9f, "
           "\"greeted\": %d, \"idle_refused\": %d, \"octets\": %zu}\n",
           units, elapsed, busy, units ? times[units / 2] : 0.0, greeted, idle_refused,
           plan[plan_length - 1].length);
    while (fgets(line, sizeof line, stdin))
        ;
    return 0;
}
